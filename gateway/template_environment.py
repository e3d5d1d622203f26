"""The sandbox in which chat templates run, with the filters, functions and tags that transformers
gives them. What a template is given is `chat_template`'s."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


def template_environment(wall: Callable[[], float]) -> jinja2.Environment:
    """`wall` is Unix time, for `strftime_now`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )

    def strftime_now(form: str) -> str:
        return spelt_date(wall(), form)

    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = strftime_now
    environment.globals["namespace"] = _PlainNamespace
    return environment


def spelt_date(wall: float, form: str) -> str:
    """In local time."""
    return datetime.fromtimestamp(wall).strftime(form)


class _PlainNamespace(Namespace):
    """Jinja's, without names that begin with an underscore, as in transformers: Python may look
    for such an attribute, and would find the template's."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may use any name
        self, *values = args
        Namespace.__init__(self, _checked_names(dict(*values, **kwargs)))

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(*next(iter(_checked_names({name: value}).items())))


def _checked_names(values: dict[str, Any]) -> dict[str, Any]:
    for name in values:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot have {name!r}: it begins with an underscore")
    return values


class _GenerationTag(Extension):
    """`{% generation %}` marks what an assistant wrote, for training. Its body is a block of its
    own, as in transformers: variables that it sets are not seen after it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replaces Jinja's own filter, which escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
