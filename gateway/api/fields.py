"""Checks single fields of a body. Each function raises RequestError, which names the field."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from shared.errors import RequestError

STOPS_MAX = 16
STOP_CHARS_MAX = 1024
STOP_IDS_MAX = 128
BAD_WORDS_MAX = 128
BAD_WORD_CHARS_MAX = 256
BAD_WORD_IDS_MAX = 4096
"""Of all of them. Each choice has them, and so has each message that begins it on a rank."""
ALLOWED_IDS_MAX = 4096
TOP_LOGPROBS_MAX = 20
LOGIT_BIAS_MAX = 1024
INT64_MAX = 2**63 - 1


def checked_top_logprobs(name: str, value: int | None) -> int | None:
    return None if value is None else int(check_range(name, value, 0, 0, TOP_LOGPROBS_MAX))


def logit_bias_of(bias: dict[int, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if not bias:
        return ()
    if len(bias) > LOGIT_BIAS_MAX or min(bias) < 0 or max(bias) >= vocab_size:
        message = f"logit_bias: at most {LOGIT_BIAS_MAX} ids, from 0 to {vocab_size - 1}"
        raise RequestError(message, param="logit_bias")
    if not all(-100 <= value <= 100 for value in bias.values()):
        raise RequestError("each logit_bias must be from -100 to 100", param="logit_bias")
    return tuple(sorted(bias.items()))


def check_range(name: str, value: Any, default: Any, low: Any, high: Any) -> Any:
    if value is None:
        return default
    if not low <= value <= high:
        upper = f" and at most {high}" if high != INT64_MAX or value > high else ""
        raise RequestError(f"{name} must be at least {low}{upper}, but it is {value}", param=name)
    return value


def seed_of(seed: int | None) -> int:
    """Accepts any signed or unsigned 64-bit integer; draws one if the client sent none."""
    if seed is None:
        return secrets.randbits(63)
    if not -(2**63) <= seed < 2**64:
        raise RequestError("seed must be a 64-bit integer", param="seed")
    return seed % 2**64


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > STOPS_MAX:
        raise RequestError(f"at most {STOPS_MAX} stop strings are supported", param="stop")
    if any(not text or len(text) > STOP_CHARS_MAX for text in stops):
        message = f"a stop string must have 1 to {STOP_CHARS_MAX} characters"
        raise RequestError(message, param="stop")
    return stops


def allowed_ids_of(ids: list[int] | None, vocab_size: int) -> tuple[int, ...]:
    if ids is None:
        return ()
    allowed = set(ids)
    if not 0 < len(allowed) <= ALLOWED_IDS_MAX or min(allowed) < 0 or max(allowed) >= vocab_size:
        message = f"allowed_token_ids: 1 to {ALLOWED_IDS_MAX} ids, from 0 to {vocab_size - 1}"
        raise RequestError(message, param="allowed_token_ids")
    return tuple(sorted(allowed))


def bad_word_ids(
    words: list[str] | None, ids_of: Callable[[str], Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """As vLLM: each word as it is written at the beginning of a text and after a space. `ids_of`
    encodes a short text. Takes its time: some tenths of a millisecond for each word."""
    if not words:
        return ()
    if len(words) > BAD_WORDS_MAX:
        raise RequestError(f"at most {BAD_WORDS_MAX} bad words are supported", param="bad_words")
    if any(not word.strip() or len(word) > BAD_WORD_CHARS_MAX for word in words):
        message = f"a bad word must have 1 to {BAD_WORD_CHARS_MAX} characters"
        raise RequestError(message, param="bad_words")
    spelt = (tuple(ids_of(form)) for w in words for form in (w.lstrip(), " " + w.lstrip()))
    found = tuple(dict.fromkeys(ids for ids in spelt if ids))
    if sum(map(len, found)) > BAD_WORD_IDS_MAX:
        message = (
            f"the bad words may have {BAD_WORD_IDS_MAX} tokens in all, with and without a space"
        )
        raise RequestError(message, param="bad_words")
    return found


def stop_ids_of(ids: list[int] | None, vocab_size: int) -> tuple[int, ...]:
    if not ids:
        return ()
    if len(ids) > STOP_IDS_MAX or min(ids) < 0 or max(ids) >= vocab_size:
        message = f"stop_token_ids: at most {STOP_IDS_MAX} ids, from 0 to {vocab_size - 1}"
        raise RequestError(message, param="stop_token_ids")
    return tuple(sorted(set(ids)))
