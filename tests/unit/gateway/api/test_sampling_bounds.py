"""What a request may tell a rank about each of its choices is bounded: all choices have it."""

from __future__ import annotations

import pytest

from gateway.api.fields import ALLOWED_IDS_MAX, BAD_WORD_IDS_MAX, allowed_ids_of, bad_word_ids
from shared.errors import RequestError

VOCAB = 100_000


def test_as_many_ids_as_are_allowed_are_allowed() -> None:
    most = list(range(ALLOWED_IDS_MAX))
    assert allowed_ids_of(most * 2, VOCAB) == tuple(most)
    with pytest.raises(RequestError) as caught:
        allowed_ids_of([*most, ALLOWED_IDS_MAX], VOCAB)
    assert caught.value.param == "allowed_token_ids"


def test_bad_words_are_bounded_by_their_tokens() -> None:
    of_one = BAD_WORD_IDS_MAX // 128  # each word is encoded in two ways

    def ids_of(text: str) -> list[int]:
        return [ord(letter) for letter in text.strip()] * (len(text) - len(text.lstrip()) + 1)

    words = [chr(0x100 + n) * (of_one // 3) for n in range(128)]
    assert len(bad_word_ids(words, ids_of)) == 256
    with pytest.raises(RequestError) as caught:
        bad_word_ids([word * 2 for word in words], ids_of)
    assert caught.value.param == "bad_words"
