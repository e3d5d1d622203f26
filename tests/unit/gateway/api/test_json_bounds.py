"""How many values a body may have, and what is not counted: whatever stands in a text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.api.json_bounds import (
    MEMBERS_MAX,
    OBJECTS_MAX,
    STRINGS_MAX,
    UNCOUNTED_BYTES_MAX,
    VALUES_MAX,
    check_num_values,
)
from shared.errors import RequestError


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({f"{i:06}": 1 for i in range(MEMBERS_MAX + 1)}, "members"),
        ([[]] * OBJECTS_MAX, "objects and lists"),
        ([{}] * OBJECTS_MAX, "objects and lists"),
        (["a"] * (STRINGS_MAX + 1), "strings"),
        ([1] * (VALUES_MAX + 2), "values"),
    ],
)
def test_too_many_values_are_refused(value: Any, what: str) -> None:
    with pytest.raises(RequestError, match=what) as caught:
        check_num_values(json.dumps(value).encode())
    assert caught.value.code == "too_many_values"


@pytest.mark.parametrize(
    "value",
    [
        {f"{i:06}": 1 for i in range(MEMBERS_MAX)},
        [[]] * (OBJECTS_MAX - 1),
        ["a"] * STRINGS_MAX,
        [1] * (VALUES_MAX + 1),
        "{[:," * VALUES_MAX,
        '"' * VALUES_MAX,
        '\\",' * VALUES_MAX,
        {"a\\": "\\" * VALUES_MAX, "b": '{"\\": [1, 2]}' * VALUES_MAX},
    ],
)
def test_texts_do_not_count(value: Any) -> None:
    check_num_values(json.dumps(value).encode())


@pytest.mark.parametrize("raw", [b'"', b"\\", b'\\"', b"\xff", b'{"a'])
def test_what_is_not_json_is_left_to_the_decoder(raw: bytes) -> None:
    check_num_values(raw)
    check_num_values(raw * UNCOUNTED_BYTES_MAX)
