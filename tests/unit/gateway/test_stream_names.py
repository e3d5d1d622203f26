"""Names of streams: every gateway with the secret makes the same of them, and nobody else can."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.stream_names import SPELT_CHARACTERS, StreamName, StreamNames

SECRET = b"a secret of thirty-two characters"
NAMES = StreamNames(SECRET)
NAME = StreamName(1_700_000_000, b"\1" * 8)
MINE = b"tenant a, this body"


def test_another_gateway_makes_the_same_of_a_name() -> None:
    other = StreamNames(SECRET)
    spelt = NAMES.spell(NAME, MINE)
    assert len(spelt) == SPELT_CHARACTERS
    read = other.read(spelt, MINE)
    assert read == NAME
    assert other.answer_id(read) == NAMES.answer_id(NAME)
    assert other.seed(read) == NAMES.seed(NAME) < 1 << 53
    assert other.key(read, "a", 1) == NAMES.key(NAME, "a", 1)


def test_names_differ_and_say_when_they_were_made() -> None:
    names = [NAMES.new(1_700_000_000.9) for _ in range(100)]
    assert {name.created for name in names} == {1_700_000_000}
    assert len({NAMES.answer_id(name) for name in names}) == 100
    assert len({NAMES.seed(name) for name in names}) == 100


def test_each_choice_of_each_tenant_has_a_key_of_its_own() -> None:
    keys = {NAMES.key(NAME, tenant, choice) for tenant in ("", "a", "1") for choice in (0, 1, 11)}
    assert len(keys) == 9
    assert StreamNames(b"another").key(NAME, "a", 0) not in keys
    assert {len(key) for key in keys} == {16}


@pytest.mark.parametrize("secret", [SECRET, b""])
def test_a_name_is_of_what_belongs_to_it_alone(secret: bytes) -> None:
    names = StreamNames(secret)
    spelt = names.spell(NAME, MINE)
    assert names.read(spelt, MINE + b"!") is None
    assert names.read(spelt, b"") is None
    assert StreamNames(b"another").read(spelt, MINE) is None


@given(st.integers(0, 20), st.integers(1, 255))
def test_no_changed_name_is_believed(place: int, change: int) -> None:
    signed = bytearray(base64.urlsafe_b64decode(NAMES.spell(NAME, MINE)))
    signed[place] ^= change
    assert NAMES.read(base64.urlsafe_b64encode(signed).decode(), MINE) is None


@given(st.text(max_size=40))
def test_no_other_text_is_a_name(text: str) -> None:
    assert NAMES.read(text, MINE) is None
