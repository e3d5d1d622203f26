"""Passes requests on to the leader: whichever control plane is asked, the leader answers."""

from __future__ import annotations

import ssl

import aiohttp
from aiohttp import web

from shared.errors import Unavailable

FORWARDED = "X-Starfish-Forwarded-For"
"""The address of who asked, set by the control plane that passes a request on. It is believed,
because it comes with the token."""
_CONNECT_S = 2.0
_KEPT = ("Retry-After", "Allow")
"""Headers of the leader's answer that say what to do next."""


class Forwarder:
    """Call `close` at the end. `tls` says whose certificates are believed."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._http: aiohttp.ClientSession | None = None

    async def forward(self, request: web.Request, body: bytes, leader_url: str) -> web.Response:
        """The leader's answer. Raises Unavailable if it does not answer."""
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
        try:
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
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable(
                f"the leader at {leader_url} does not answer ({type(error).__name__}); ask again "
                "with the same request_id"
            ) from error

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
