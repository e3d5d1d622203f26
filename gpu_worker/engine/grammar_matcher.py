"""Guided decoding: which tokens a session's grammar allows next. The state is a function of the
grammar and the tokens generated so far, so a continuation on another rank has the same state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from gpu_worker.engine.token_limits import TokenBitmask
from shared.errors import CheckpointError, GrammarError


class GrammarCompiler:
    """Makes matchers for one tokenizer. The library works on bytes: a token may begin and end
    anywhere in the text."""

    def __init__(self, folder: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """Raises CheckpointError if the folder has no readable tokenizer.json."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"cannot read {path}; guided decoding needs the tokenizer")
        try:
            self._tokenizer = LLTokenizer(
                str(path), n_vocab=vocab_size, eos_token=list(eos_token_ids) or None
            )
        except ValueError as error:
            raise CheckpointError(f"{path} does not serve guided decoding: {error}") from error

    def compile(self, grammar: str, emitted: Sequence[int]) -> GrammarMatcher:
        """A matcher after the tokens `emitted` so far. Raises GrammarError if the grammar is
        malformed, or does not allow them."""
        return GrammarMatcher(self._tokenizer, grammar, emitted)


class GrammarMatcher:
    """For one session. `allowed` are the tokens that may come next: bit `t % 32` of word `t // 32`.
    If the text may end, the end tokens are among them; if it must end, they are the only ones."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str, emitted: Sequence[int]) -> None:
        self.end_ids = tuple(tokenizer.eos_tokens)
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._matcher.consume_tokens(list(emitted))
        self.allowed = self._next_bitmask()

    def accept_token(self, token: int) -> None:
        """`token` was drawn. Raises GrammarError if the grammar cannot be followed further."""
        self._matcher.consume_token(token)
        self.allowed = self._next_bitmask()

    def _next_bitmask(self) -> TokenBitmask:
        if not self._matcher.is_error():
            bits: TokenBitmask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {self._matcher.get_error()[:300]}")
        return bits
