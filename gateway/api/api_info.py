"""What `/openapi.json` says of the gateway's API as a whole."""

from __future__ import annotations

from typing import Any

from shared.openapi import ApiInfo

_RETRY = {"Retry-After": {"description": "seconds", "schema": {"type": "string"}}}
_CHALLENGE = {"WWW-Authenticate": {"schema": {"type": "string"}}}
_ERRORS: dict[str, tuple[str, dict[str, Any]]] = {
    "400": ("the request cannot be done; `error.param` names the field", {}),
    "401": ("no right API key", _CHALLENGE),
    "404": ("no such model, response or path", {}),
    "408": ("the body did not come in time", {}),
    "413": ("the body is too large", {}),
    "429": ("the gateway is full, or the key has reached a limit", _RETRY),
    "503": ("nobody can serve it now", _RETRY),
    "504": ("the request's own timeout is over", {}),
    "4XX": ("what is wrong with the request", {}),
    "5XX": ("what failed here", {}),
}
GATEWAY_API = ApiInfo(
    title="Starfish gateway",
    description="OpenAI's API, and parts of Anthropic's, vLLM's and SGLang's, served by ranks that "
    "may die.",
    errors=_ERRORS,
    errors_without_body=("401", "4XX", "5XX"),
    security=({}, {"key": []}),
    security_schemes={"key": {"type": "http", "scheme": "bearer"}},
)
