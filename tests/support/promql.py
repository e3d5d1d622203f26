"""What an expression of Prometheus' query language reads: enough of the language for our own."""

from __future__ import annotations

import re
from collections.abc import Iterator

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_MATCHERS = re.compile(r"\{([^{}]*)\}")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")
_RANGE = re.compile(r"\[[^\]]*\]")
_NAME = re.compile(r"[A-Za-z_:][A-Za-z0-9_:]*(?!\s*\(|[A-Za-z0-9_:])")
_WORDS = {"and", "or", "unless", "bool", "offset"}


def metric_names(expression: str) -> set[str]:
    """The metrics that it names."""
    bare = _STRING.sub("", expression)
    for left_out in (_MATCHERS, _GROUPING, _RANGE):
        bare = left_out.sub(" ", bare)
    return set(_NAME.findall(bare)) - _WORDS


def label_names(expression: str) -> set[str]:
    """The labels that it selects or groups by."""
    return set(_label_names(_STRING.sub("", expression)))


def _label_names(bare: str) -> Iterator[str]:
    for matchers in _MATCHERS.findall(bare):
        yield from re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)
    for grouping in _GROUPING.findall(bare):
        yield from re.findall(r"\w+", grouping)
