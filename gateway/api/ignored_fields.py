"""Tells a client of the fields of its request that no API has: one may be misspelt, and its client
should know that it had no effect."""

from __future__ import annotations

from aiohttp import web

IGNORED_FIELDS = web.RequestKey("ignored_fields", list[str])
IGNORED_FIELDS_HEADER = "X-Starfish-Ignored-Fields"


async def name_ignored_fields(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`."""
    if names := request.get(IGNORED_FIELDS):
        response.headers[IGNORED_FIELDS_HEADER] = ",".join(names)
