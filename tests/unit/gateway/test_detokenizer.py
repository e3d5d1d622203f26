"""Text from tokens: its pieces joined equal the text of all tokens at once, and no piece ends
inside a character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from gateway.detokenizer import Detokenizer, TokenBytes
from gateway.text_stream import TextStream
from shared.types import FinishReason
from tests.support.tiny_tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
TOKENIZER.add_tokens([AddedToken("<tool ü>", special=False)])
BYTES = TokenBytes(TOKENIZER.get_vocab(with_added_tokens=True), {0, 1})
NUM_IDS = TOKENIZER.get_vocab_size(with_added_tokens=True)


def streamed(ids: list[int], cut: int = 1) -> str:
    detokenizer = Detokenizer(BYTES)
    parts = [detokenizer.feed(ids[i : i + cut]) for i in range(0, len(ids), cut)]
    return "".join(parts) + detokenizer.flush()


@given(ids=st.lists(st.integers(0, NUM_IDS - 1), max_size=60), cut=st.integers(1, 7))
def test_any_ids_give_what_the_tokenizer_gives(ids: list[int], cut: int) -> None:
    assert streamed(ids, cut) == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(text=st.text(max_size=60))
def test_any_text_survives_the_way_through_tokens(text: str) -> None:
    assert streamed(TOKENIZER.encode(text, add_special_tokens=False).ids) == text


def test_a_character_comes_with_its_last_byte() -> None:
    ids = Tokenizer.encode(TOKENIZER, "🌵").ids
    detokenizer = Detokenizer(BYTES)
    parts = [detokenizer.feed([token]) for token in ids]
    assert len(ids) > 1
    assert parts == [""] * (len(ids) - 1) + ["🌵"]


def test_special_and_unknown_ids_have_no_text() -> None:
    assert streamed([0, 1, NUM_IDS + 5]) == ""


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text).ids
    return ids


def test_a_stop_token_is_left_out_but_a_last_token_is_not() -> None:
    ids = ids_of("arm")
    assert TextStream(BYTES).feed([*ids, 40], FinishReason.STOP).text == "arm"
    assert TextStream(BYTES).feed(ids, FinishReason.LENGTH).text == "arm"


def test_the_end_flushes_what_a_stop_string_held_back() -> None:
    stream = TextStream(BYTES, stops=["arms"])
    assert stream.feed(ids_of("an arm")).text == "an "
    assert stream.feed([], FinishReason.LENGTH) == ("arm", 0, None)


def test_a_stop_string_across_tokens_tells_how_many_tokens_it_took() -> None:
    ids = ids_of("cut off an arm, and it grew back")
    for cut in (1, 3, len(ids)):
        stream = TextStream(BYTES, stops=["n ar"])
        text, used = "", 0
        for start in range(0, len(ids), cut):
            piece = stream.feed(ids[start : start + cut])
            text += piece.text
            used += piece.num_ids
            if piece.stop is not None:
                break
        assert text == "cut off a"
        assert TOKENIZER.decode(ids[:used]).startswith("cut off an ar")
        assert "n ar" not in TOKENIZER.decode(ids[: used - 1])


@pytest.mark.parametrize(("min_tokens", "shown"), [(0, ""), (1, "arm ")])
def test_stop_strings_count_only_after_min_tokens(min_tokens: int, shown: str) -> None:
    arm, space_arm = ids_of("arm"), ids_of(" arm")
    stream = TextStream(BYTES, stops=["arm"], min_tokens=min_tokens and len(arm))
    piece = stream.feed([*arm, *space_arm])
    assert (piece.text, piece.stop) == (shown, "arm")
