"""The one user of llguidance: compiles grammars for a tokenizer, with bounds on what a mask may
cost, and keeps what it compiled. Runs in the grammar child."""

from __future__ import annotations

import json
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from shared.errors import CheckpointError, GrammarError
from shared.grammars.spelt_tokens import plain_tokenizer

WALK_STEPS = 8
"""So many tokens are tried of a grammar before it is accepted: one that cannot go on, or costs too
much, mostly shows it at once."""

ERROR_CHARS_MAX = 200

_LIMITS = LLParserLimits(
    max_items_in_row=10_000,  # an optional property of an object takes 4
    max_lexer_states=50_000,  # 1 to 2 kB each
    verbose_errors=False,
)


def _resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * 4096


class GrammarCompiler:
    """The library works on bytes: a token may begin and end anywhere in the text. One thread at a
    time may call `open`; matchers are independent of it."""

    def __init__(
        self,
        tokenizer_file: Path,
        *,
        vocab_size: int | None = None,
        eos_token_ids: Sequence[int] = (),
        cache_bytes_max: int = 256 << 20,
        resident_bytes: Callable[[], int] = _resident_bytes,
    ) -> None:
        """`resident_bytes` tells the memory of this process. Raises CheckpointError if the file is
        no tokenizer that serves guided decoding."""
        try:
            file = json.loads(tokenizer_file.read_bytes())
            plain = plain_tokenizer(file, secrets.token_hex(8))
            self._tokenizer = LLTokenizer(
                json.dumps(plain.file),
                n_vocab=vocab_size,
                eos_token=list(eos_token_ids or plain.end_ids) or None,
            )
        except OSError as error:
            raise CheckpointError(
                f"cannot read {tokenizer_file}; guided decoding needs the tokenizer"
            ) from error
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{tokenizer_file} does not serve guided decoding: {error}"
            ) from error
        self.special_ids: Mapping[str, int] = plain.special_ids
        self._cache_bytes_max = cache_bytes_max
        self._cache: OrderedDict[str, _Compiled] = OrderedDict()
        self._cache_bytes = 0
        self._resident_bytes = resident_bytes

    @property
    def end_ids(self) -> tuple[int, ...]:
        return tuple(self._tokenizer.eos_tokens)

    @property
    def cached_bytes(self) -> int:
        return self._cache_bytes

    def has_cached(self, grammar: str) -> bool:
        return grammar in self._cache

    def open(self, grammar: str, emitted: Sequence[int]) -> Matcher:
        """A matcher after the tokens `emitted` so far. Raises GrammarError if the grammar is
        malformed, or does not allow them."""
        compiled = self._compiled(grammar)
        matcher = Matcher(compiled.matcher.deep_copy(), None if emitted else compiled.first_bits)
        if emitted:
            matcher.accept(emitted)
        return matcher

    def try_out(self, grammar: str) -> None:
        """Compiles it and follows it for a few tokens, always by the last that is allowed. Raises
        GrammarError."""
        matcher = self.open(grammar, ())
        for _ in range(WALK_STEPS):
            token = _last_allowed(matcher.bits(), self.end_ids)
            if token is None:
                return
            matcher.accept((token,))

    def _compiled(self, grammar: str) -> _Compiled:
        found = self._cache.get(grammar)
        if found is not None:
            self._cache.move_to_end(grammar)
            return found
        before = self._resident_bytes()
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        _require_sound(matcher)
        first_bits = Matcher(matcher.deep_copy()).bits()
        # What the library took is seen only as growth of the process; its text is the least.
        num_bytes = max(self._resident_bytes() - before, len(grammar) + len(first_bits))
        compiled = _Compiled(matcher, first_bits, num_bytes)
        self._keep(grammar, compiled)
        return compiled

    def _keep(self, grammar: str, compiled: _Compiled) -> None:
        self._cache[grammar] = compiled
        self._cache_bytes += compiled.num_bytes
        while self._cache_bytes > self._cache_bytes_max and len(self._cache) > 1:
            self._cache_bytes -= self._cache.popitem(last=False)[1].num_bytes


class _Compiled(NamedTuple):
    """A matcher that has taken nothing in, and its first mask, which may be the dearest."""

    matcher: LLMatcher
    first_bits: bytes
    num_bytes: int


class Matcher:
    """For one session. If the text may end, the end tokens are among the allowed ones; if it must
    end, they are the only ones."""

    def __init__(self, matcher: LLMatcher, bits: bytes | None = None) -> None:
        """`bits`: its mask, if it is known."""
        self._matcher = matcher
        self._bits = bits

    def accept(self, tokens: Sequence[int]) -> None:
        """Raises GrammarError if the grammar does not allow them."""
        self._bits = None
        self._matcher.consume_tokens(list(tokens))
        _require_sound(self._matcher)

    def bits(self) -> bytes:
        """The tokens that may come next, a bit each. Raises GrammarError if that takes too much,
        or if there is none."""
        if self._bits is None:
            self._bits = self._matcher.compute_bitmask()
            _require_sound(self._matcher)
        return self._bits


def _require_sound(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarError(client_words(matcher.get_error()))


def client_words(error: str) -> str:
    """The library's own state, which follows its first line, is nobody's business."""
    text = error.strip().partition("\n")[0].partition("<state>")[0].strip()
    if text.startswith("NoExtension"):
        return "no text follows it"
    return text[:ERROR_CHARS_MAX] or "it cannot be followed"


def _last_allowed(bits: bytes, end_ids: Sequence[int]) -> int | None:
    """The highest id that is allowed and does not end the text; None if there is none."""
    left = int.from_bytes(bits, "little")
    for token in end_ids:
        left &= ~(1 << token)
    return left.bit_length() - 1 if left else None
