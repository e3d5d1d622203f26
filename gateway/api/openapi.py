"""The OpenAPI description of what is served, made from the types that decode the bodies, and a page
that shows it to people."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shared.version import starfish_version

_REFERENCE = "#/components/schemas/{name}"
JSON = "application/json"
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
        }
    },
}
"""What OpenAI's and Anthropic's errors have in common."""
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
"""Status → what it means, and the headers that come with it."""
_ERRORS_WITHOUT_BODY = ("401", "4XX", "5XX")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """`path` as aiohttp writes it. `summary` is a phrase. `body`: what decodes a POST's body.
    `content_type` is that of an answer with status 200; with 503 as well if `reports`."""

    method: str
    path: str
    summary: str
    body: type[msgspec.Struct] | None = None
    streams: bool = False
    content_type: str = JSON
    reports: bool = False

    @property
    def plain_path(self) -> str:
        """Without the patterns of its parameters."""
        return re.sub(r"\{(\w+):[^}]*\}", r"{\1}", self.path)


def openapi_document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    bodies = [endpoint.body for endpoint in endpoints if endpoint.body is not None]
    schemas, components = msgspec.json.schema_components(bodies, ref_template=_REFERENCE)
    schema_of = dict(zip(bodies, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        schema = None if endpoint.body is None else schema_of[endpoint.body]
        operations = paths.setdefault(endpoint.plain_path, {})
        operations[endpoint.method.lower()] = _operation(endpoint, schema)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Starfish gateway",
            "version": starfish_version(),
            "description": "OpenAI's API, and parts of Anthropic's, vLLM's and SGLang's, served by "
            "ranks that may die.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(endpoint: Endpoint, schema: dict[str, Any] | None) -> dict[str, Any]:
    name = re.sub(r"\W+", "_", f"{endpoint.method.lower()}{endpoint.plain_path}").strip("_")
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": endpoint.summary,
        "responses": _responses(endpoint),
    }
    parameters = re.findall(r"\{(\w+)\}", endpoint.plain_path)
    if parameters:
        operation["parameters"] = [
            {"name": each, "in": "path", "required": True, "schema": {"type": "string"}}
            for each in parameters
        ]
    if schema is not None:
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        operation["requestBody"] = body
    return operation


def _responses(endpoint: Endpoint) -> dict[str, Any]:
    content: dict[str, Any] = {endpoint.content_type: {"schema": {}}}
    if endpoint.content_type == JSON:
        content[JSON] = {"schema": {"type": "object"}}
    if endpoint.streams:
        content["text/event-stream"] = {"schema": {"description": "events until the answer ends"}}
    answer = {"description": "the answer", "content": content}
    statuses = _ERRORS if endpoint.body is not None else _ERRORS_WITHOUT_BODY
    errors = {
        status: {
            "description": _ERRORS[status][0],
            "headers": _ERRORS[status][1],
            "content": {JSON: {"schema": _ERROR_SCHEMA}},
        }
        for status in statuses
    }
    if endpoint.reports:
        errors["503"] = {"description": "why not, in `reasons`", "content": content}
    return {"200": answer, **errors}


def openapi_page(document: dict[str, Any]) -> str:
    """Self-contained: no script, nothing from elsewhere."""
    schemas = document["components"]["schemas"]
    sections = [
        f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>"
        f"<p>{html.escape(operation['summary'])}</p>{_fields(operation, schemas)}"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    info = document["info"]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{info['title']}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{info['title']} {html.escape(info['version'])}</h1>"
        f"<p>{info['description']} For machines: <a href='/openapi.json'>/openapi.json</a>.</p>"
        + "".join(sections)
        + "</body></html>"
    )


def _fields(operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    if "requestBody" not in operation:
        return ""
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = schemas[reference.rsplit("/", 1)[1]]
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(_type_of(field))}</td>"
        f"<td>{'required' if name in required else ''}</td></tr>"
        for name, field in schema["properties"].items()
    )
    return f"<table><tr><th>field</th><th>type</th><th></th></tr>{rows}</table>"


def _type_of(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        kinds = [_type_of(each) for each in field["anyOf"]]
        return " or ".join(kind for kind in kinds if kind != "null")
    if "$ref" in field:
        return "object"
    return str(field.get("type", "any"))


_STYLE = (
    ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;"
    "margin:2rem auto;padding:0 1rem}h2{margin-top:2rem;font-size:1.1rem}table{border-collapse:"
    "collapse}td,th{text-align:left;padding:.1rem 1rem .1rem 0;vertical-align:top}"
)
