"""The sequences that a grammar guides and that cannot go on yet: their grammar is being compiled,
or the mask of their next token is being computed. No step contains them, and none waits for
them."""

from __future__ import annotations

from typing import NamedTuple

from gpu_worker.engine.grammar_matcher import GrammarMatcher, Grammars
from gpu_worker.engine.sequence import Sequence
from shared.errors import GrammarError


class Settled(NamedTuple):
    """`compiled` have a matcher now and may be admitted; `failed` can never be followed."""

    compiled: list[Sequence]
    failed: list[tuple[Sequence, str]]


class GuidedSequences:
    """Only the scheduler changes it."""

    def __init__(self, grammars: Grammars | None) -> None:
        self._grammars = grammars
        self._compiling: dict[Sequence, GrammarMatcher] = {}
        self._held: dict[Sequence, None] = {}

    def __len__(self) -> int:
        return len(self._compiling) + len(self._held)

    @property
    def compiling(self) -> list[Sequence]:
        return list(self._compiling)

    def holds(self, sequence: Sequence) -> bool:
        return sequence in self._held

    def open(self, sequence: Sequence) -> None:
        """Begins to compile its grammar. Raises GrammarError if this rank follows none."""
        if self._grammars is None:
            raise GrammarError("this rank cannot follow grammars: it has no tokenizer")
        emitted = sequence.tokens[sequence.num_prompt :]
        matcher = self._grammars.open(sequence.sampling.grammar, emitted)
        self._compiling[sequence] = matcher

    def hold_if_pending(self, sequence: Sequence) -> None:
        """Call it when a token was appended to a sequence that goes on."""
        if sequence.matcher is not None and sequence.matcher.allowed is None:
            self._held[sequence] = None

    def wait(self) -> None:
        """Gives masks that are due at once a moment to come."""
        if self._held and self._grammars is not None:
            self._grammars.wait()

    def settle(self) -> Settled:
        """What has become known. Those that can go on are held no longer."""
        settled = Settled([], [])
        for sequence, matcher in list(self._compiling.items()):
            if matcher.error is not None:
                settled.failed.append((sequence, matcher.error))
            elif matcher.allowed is not None:
                del self._compiling[sequence]
                sequence.set_matcher(matcher)
                settled.compiled.append(sequence)
        for sequence in list(self._held):
            assert sequence.matcher is not None, "only guided ones are held"
            if sequence.matcher.error is not None:
                settled.failed.append((sequence, sequence.matcher.error))
            elif sequence.matcher.allowed is not None:
                del self._held[sequence]
        return settled

    def close(self, sequence: Sequence) -> None:
        """It has ended."""
        self._held.pop(sequence, None)
        matcher = self._compiling.pop(sequence, sequence.matcher)
        if matcher is not None:
            matcher.close()
