"""Who may use the admin API: whoever shows its token. Compared in constant time, and never
logged."""

from __future__ import annotations

import hmac
from pathlib import Path

from aiohttp import web

from shared.errors import ConfigError, Unauthenticated
from shared.secret import CHARACTERS_MIN, read_private_file

_FLAG = "--admin-token-file"


def read_admin_token(path: Path) -> bytes:
    """Raises ConfigError if the file cannot be read, is open to other users, or has less than 32
    characters."""
    token = read_private_file(path, flag=_FLAG)
    if len(token) < CHARACTERS_MIN:
        raise ConfigError(
            f"{_FLAG} {path}: a token has at least {CHARACTERS_MIN} characters; make one with "
            "`openssl rand -hex 32`"
        )
    return token


def require_token(request: web.Request, token: bytes) -> None:
    """Raises Unauthenticated unless the request has `Authorization: Bearer TOKEN`."""
    scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
    sent_bytes = sent.strip().encode(errors="surrogateescape")
    if scheme.lower() == "bearer" and hmac.compare_digest(sent_bytes, token):
        return
    what = "this is not the admin token" if sent_bytes else "the admin API asks for its token"
    raise Unauthenticated(
        f"{what}: send it as Authorization: Bearer TOKEN; `starfish up` writes it to the file "
        "admin-token in its run folder"
    )
