"""The page for people at `GET /`: one file without data, which asks for the token and then for
`/v1/status`. A browser runs nothing but its own script, and lets it reach nothing but this
address."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from aiohttp import web

PATH = "/"
_FILE = Path(__file__).with_name("page.html")
_INLINE = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)


def page_response() -> web.Response:
    text, headers = _page()
    return web.Response(text=text, content_type="text/html", charset="utf-8", headers=headers)


@cache
def _page() -> tuple[str, dict[str, str]]:
    """The text and its headers."""
    text = _FILE.read_text(encoding="utf-8")
    return text, {
        "Content-Security-Policy": _policy(text),
        "X-Frame-Options": "DENY",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


def _policy(text: str) -> str:
    """Inline code runs by its hash alone."""
    allowed = " ".join(
        f"{name}-src '{_hash_of(content)}';" for name, content in _INLINE.findall(text)
    )
    return (
        f"default-src 'none'; {allowed} connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


def _hash_of(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
