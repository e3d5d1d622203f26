"""Asks the admin API of an instance. A control plane may die meanwhile: then the same request is
sent again, with the same id, to whoever leads by then."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping
from typing import Any, TypeVar

import aiohttp
import msgspec

from cli.admin.answers import Accepted, Status
from cli.run_dir import Target
from shared.clock import Clock
from shared.errors import ConfigError, StarfishError, StoreError, Unavailable, WireError
from shared.etcd_store import connect_store
from shared.keys import Keys
from shared.records import LeaderRecord, unpack_record
from shared.secret import read_private_file
from shared.server_certificate import trusting

_RETRY_S = 0.25
_ASK_TIMEOUT_S = 10.0
_T = TypeVar("_T", bound=msgspec.Struct)


class Refused(StarfishError):
    """The instance does not do this, and says what would be needed."""

    definitely_not_done = True


class Malformed(ConfigError):
    """The control plane does not understand what is asked, such as a number out of bounds."""


class AdminClient:
    """Call `close` at the end."""

    def __init__(self, target: Target, clock: Clock) -> None:
        """Raises ConfigError if no token is known, or the authority cannot be read."""
        file = target.admin_token_file
        if file is None:
            raise ConfigError(
                "the admin API asks for its token: pass --admin-token-file, or --run-dir with the "
                "folder of `starfish up`"
            )
        token = read_private_file(file, flag="--admin-token-file").decode(errors="replace")
        timeout = aiohttp.ClientTimeout(total=_ASK_TIMEOUT_S)
        headers = {"Authorization": f"Bearer {token}"}
        ca = target.admin_ca
        connector = aiohttp.TCPConnector(
            ssl=True if ca is None else trusting(ca, flag="--admin-ca")
        )
        self._http = aiohttp.ClientSession(
            timeout=timeout, headers=headers, connector=connector, trust_env=False
        )
        self._target = target
        self._clock = clock

    async def close(self) -> None:
        await self._http.close()

    async def change(self, name: str, fields: Mapping[str, Any], *, patience_s: float) -> Accepted:
        """Asks again for `patience_s` seconds while nobody leads. Raises Refused, ConfigError if
        what is asked is malformed or the token is wrong, and Unavailable."""
        body = {"request_id": uuid.uuid4().hex, **fields}
        deadline = self._clock.now() + patience_s
        while True:
            try:
                return await self._ask("POST", f"/v1/{name}", body, Accepted)
            except Unavailable:
                if self._clock.now() >= deadline:
                    raise
            await asyncio.sleep(_RETRY_S)

    async def status(self) -> Status:
        """Raises Unavailable if no control plane answers."""
        return await self._ask("GET", "/v1/status", None, Status)

    async def processes(self) -> dict[int, int]:
        """The process of each rank. None are known if nobody answers now: what is new is then not
        told from what was there."""
        try:
            status = await self.status()
        except Unavailable:
            return {}
        return {rank.rank: rank.process for rank in status.ranks if rank.process is not None}

    async def _ask(self, method: str, path: str, body: Any, kind: type[_T]) -> _T:
        url = await self._url()
        try:
            async with self._http.request(
                method, url + path, json=body, allow_redirects=False
            ) as response:
                raw, status = await response.read(), response.status
        except aiohttp.ClientConnectorCertificateError as error:
            raise ConfigError(
                f"the certificate of {url} is not believed ({error.certificate_error}); pass "
                "--admin-ca with its authority"
            ) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable(
                f"no control plane answers at {url} ({type(error).__name__}); serving goes on, "
                "changes wait"
            ) from error
        if status >= 300:
            raise _error(status, raw)
        try:
            return msgspec.json.decode(raw, type=kind)
        except msgspec.MsgspecError as error:
            raise WireError(f"{url} does not answer as an admin API: {error}") from error

    async def _url(self) -> str:
        """Raises Unavailable if nobody leads, and ConfigError if the leader has no admin API."""
        if self._target.admin_url:
            return self._target.admin_url.rstrip("/")
        try:
            store = await connect_store(self._target.store)
            try:
                found = await store.get(Keys(self._target.instance).leader)
            finally:
                await store.close()
            leader = unpack_record(found.value, LeaderRecord) if found is not None else None
        except StoreError as error:
            raise Unavailable(str(error)) from error
        if leader is None:
            raise Unavailable("no control plane leads; serving goes on, changes wait")
        if not leader.admin_url:
            raise ConfigError(
                f"the control plane {leader.control_plane} has no admin API: start it with "
                "--admin-port and --admin-token-file"
            )
        return leader.admin_url


def _error(status: int, raw: bytes) -> StarfishError:
    try:
        message = str(json.loads(raw)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the admin API answers with status {status}"
    if status == 409:
        return Refused(message)
    if status == 400:
        return Malformed(message)
    if status in (502, 503, 504):
        return Unavailable(message)
    return ConfigError(message)
