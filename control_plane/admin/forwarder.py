"""Passes requests on to the leader: whichever control plane is asked, the leader answers."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

import aiohttp
from aiohttp import web

from shared.errors import Unavailable

FORWARDED = "X-Starfish-Forwarded-For"
"""The address of who asked, set by the control plane that passes a request on. It is believed,
because it comes with the token."""
_CONNECT_S = 2.0
_LOOK_S = 0.1
"""How often is looked whether who was asked still leads: a process that is stopped, or a host that
is lost, closes no connection, and may never answer."""
_KEPT = ("Retry-After", "Allow")
"""Headers of the leader's answer that say what to do next."""


class Forwarder:
    """Call `close` at the end. `tls` says whose certificates are believed."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._http: aiohttp.ClientSession | None = None

    async def forward(
        self, request: web.Request, body: bytes, leader_url: str, leads: Callable[[], bool]
    ) -> web.Response:
        """The answer of the leader. Raises Unavailable if it does not answer, or if `leads` says
        meanwhile that it leads no more: what it was asked may be done all the same."""
        asked = asyncio.create_task(self._ask(request, body, leader_url))
        try:
            while not asked.done():
                await asyncio.wait([asked], timeout=_LOOK_S)
                if not asked.done() and not leads():
                    raise Unavailable(
                        f"the leader at {leader_url} was lost before it answered; ask again with "
                        "the same request_id"
                    )
            return asked.result()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable(
                f"the leader at {leader_url} does not answer ({type(error).__name__}); ask again "
                "with the same request_id"
            ) from error
        finally:
            asked.cancel()

    async def _ask(self, request: web.Request, body: bytes, leader_url: str) -> web.Response:
        if self._http is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
            connector = aiohttp.TCPConnector(ssl=self._tls if self._tls is not None else True)
            self._http = aiohttp.ClientSession(
                timeout=timeout, connector=connector, trust_env=False
            )
        headers = {
            "Authorization": request.headers.get("Authorization", ""),
            "Content-Type": "application/json",
            FORWARDED: request.remote or "",
        }
        async with self._http.request(
            request.method,
            leader_url + request.path_qs,
            data=body or None,
            headers=headers,
            allow_redirects=False,
        ) as answer:
            kept = {name: answer.headers[name] for name in _KEPT if name in answer.headers}
            return web.Response(
                status=answer.status,
                body=await answer.read(),
                content_type=answer.content_type,
                headers=kept,
            )

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
