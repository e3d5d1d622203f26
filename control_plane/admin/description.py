"""What `/openapi.json` says of the admin API as a whole."""

from __future__ import annotations

from typing import Any

from shared.openapi import ApiInfo

_RETRY = {"Retry-After": {"description": "seconds", "schema": {"type": "string"}}}
_CHALLENGE = {"WWW-Authenticate": {"schema": {"type": "string"}}}
_ERRORS: dict[str, tuple[str, dict[str, Any]]] = {
    "400": ("the body is not what is asked for", {}),
    "401": ("no right token", _CHALLENGE),
    "408": ("the change goes on, but whoever waits has waited long enough", {}),
    "409": ("it cannot be; the message says what would be needed, and nothing was changed", {}),
    "413": ("the body is too large", {}),
    "503": ("no control plane leads now: ask again, with the same request_id", _RETRY),
    "5XX": ("what failed here", {}),
}
ADMIN_API = ApiInfo(
    title="Starfish admin API",
    description="Changes a running instance on purpose, unnoticed by its clients.",
    errors=_ERRORS,
    errors_without_body=("401", "503", "5XX"),
    security=({"token": []},),
    security_schemes={"token": {"type": "http", "scheme": "bearer"}},
)
