"""With which API key commands ask a gateway. It comes from the environment: arguments can be read
by every user of a host."""

from __future__ import annotations

from collections.abc import Mapping

VARIABLE = "STARFISH_API_KEY"


def client_headers(environ: Mapping[str, str]) -> dict[str, str]:
    """None without a key: a gateway that has no keys asks for none."""
    key = environ.get(VARIABLE, "").strip()
    return {"Authorization": f"Bearer {key}"} if key else {}
