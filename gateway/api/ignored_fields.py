"""Tells a client which fields of its request no API has: one may be misspelt, and had no effect."""

from __future__ import annotations

from aiohttp import web

IGNORED_FIELDS = web.RequestKey("ignored_fields", list[str])
IGNORED_FIELDS_HEADER = "X-Starfish-Ignored-Fields"
"""Header of an answer: the fields of the request that no API has."""


async def name_ignored_fields(request: web.Request, response: web.StreamResponse) -> None:
    """Before the headers of an answer are sent."""
    if names := request.get(IGNORED_FIELDS):
        response.headers[IGNORED_FIELDS_HEADER] = ",".join(names)
