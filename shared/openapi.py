"""The OpenAPI description of what is served, made from the types that decode the bodies, and a page
that shows it to people."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shared.version import starfish_version

_REFERENCE = "#/components/schemas/{name}"
JSON = "application/json"
ERROR_SCHEMA = {
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
"""What OpenAI's and Anthropic's errors have in common, and ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiInfo:
    """What all endpoints of an API share. `errors`: status → what it means, and the headers that
    come with it; only `errors_without_body` are those of endpoints that read no body. `security` as
    OpenAPI has it, of the schemes that `security_schemes` names."""

    title: str
    description: str
    errors: Mapping[str, tuple[str, dict[str, Any]]]
    errors_without_body: Sequence[str]
    security: Sequence[Mapping[str, Any]]
    security_schemes: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """`path` as aiohttp writes it. `summary` is a phrase. `body`: what decodes a POST's body.
    `needs_body`: an empty one is refused, though no field of it alone is required. `status` and
    `content_type` are those of the answer; with 503 as well if `reports`. `answer`:
    the type that an answer in JSON has."""

    method: str
    path: str
    summary: str
    body: type[msgspec.Struct] | None = None
    streams: bool = False
    content_type: str = JSON
    reports: bool = False
    answer: type[msgspec.Struct] | None = None
    status: int = 200
    needs_body: bool = True

    @property
    def plain_path(self) -> str:
        """Without the patterns of its parameters."""
        return re.sub(r"\{(\w+):[^}]*\}", r"{\1}", self.path)


def openapi_document(api: ApiInfo, endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    used = {kind for e in endpoints for kind in (e.body, e.answer) if kind is not None}
    types = sorted(used, key=lambda kind: kind.__name__)
    schemas, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        operations = paths.setdefault(endpoint.plain_path, {})
        operations[endpoint.method.lower()] = _operation(api, endpoint, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": api.title,
            "version": starfish_version(),
            "description": api.description,
        },
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": dict(api.security_schemes)},
        "security": [dict(each) for each in api.security],
    }


def _operation(
    api: ApiInfo, endpoint: Endpoint, schema_of: Mapping[type, dict[str, Any]]
) -> dict[str, Any]:
    name = re.sub(r"\W+", "_", f"{endpoint.method.lower()}{endpoint.plain_path}").strip("_")
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": endpoint.summary,
        "responses": _responses(api, endpoint, schema_of),
    }
    parameters = re.findall(r"\{(\w+)\}", endpoint.plain_path)
    if parameters:
        operation["parameters"] = [
            {"name": each, "in": "path", "required": True, "schema": {"type": "string"}}
            for each in parameters
        ]
    if endpoint.body is not None:
        content = {JSON: {"schema": schema_of[endpoint.body]}}
        required = endpoint.needs_body or _has_required_field(endpoint.body)
        operation["requestBody"] = {"required": required, "content": content}
    return operation


def _has_required_field(body: type[msgspec.Struct]) -> bool:
    return any(each.required for each in msgspec.structs.fields(body))


def _responses(
    api: ApiInfo, endpoint: Endpoint, schema_of: Mapping[type, dict[str, Any]]
) -> dict[str, Any]:
    content: dict[str, Any] = {endpoint.content_type: {"schema": {}}}
    if endpoint.content_type == JSON:
        schema = {"type": "object"} if endpoint.answer is None else schema_of[endpoint.answer]
        content[JSON] = {"schema": schema}
    if endpoint.streams:
        content["text/event-stream"] = {"schema": {"description": "events until the answer ends"}}
    answer = {"description": "the answer", "content": content}
    statuses = api.errors if endpoint.body is not None else api.errors_without_body
    errors = {
        status: {
            "description": api.errors[status][0],
            "headers": api.errors[status][1],
            "content": {JSON: {"schema": ERROR_SCHEMA}},
        }
        for status in statuses
    }
    if endpoint.reports:
        errors["503"] = {"description": "why not, in `reasons`", "content": content}
    return {str(endpoint.status): answer, **errors}


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
