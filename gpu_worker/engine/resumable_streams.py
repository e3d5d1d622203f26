"""The sequences that another gateway may take over, by the key of their stream: those that run, and
those whose gateway is gone. The latter are *orphaned* and go on for a while, so that a client that
comes back through another gateway finds its tokens here. Pure; the scheduler tells it what happens.

A stream key is known only to gateways, and they make the same one only for the same client and the
same request. So who names it may have the sequence, also from a gateway that is still there: its
client is no longer. What is asked must be what the sequence computes all the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from msgspec.structs import replace

from gpu_worker.engine.sequence import Origin, Sequence
from shared.types import FinishReason
from shared.wire import SessionTokens, Submit


class ResumableStreams:
    """At most `orphans_max` sequences are orphaned at a time, ended ones included. If there are
    more, the oldest of the tenant that has most must go."""

    def __init__(self, orphans_max: int) -> None:
        self._orphans_max = orphans_max
        self._streams: dict[bytes, Sequence] = {}
        self._orphans: dict[Sequence, FinishReason | None] = {}  # the reason if it has ended

    def add(self, sequence: Sequence) -> None:
        """It is new here. An earlier one of the same key can be taken over no more."""
        if sequence.stream_key:
            self._streams[sequence.stream_key] = sequence

    def on_end(self, sequence: Sequence, finish: FinishReason | None) -> None:
        """`finish`: it has all its tokens. Only then an orphan is kept until it is dropped."""
        if sequence in self._orphans and finish is not None:
            self._orphans[sequence] = finish
        else:
            self._forget(sequence)

    def orphan(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """The gateway of these is gone. Returns those, and earlier orphans, that end now: nobody
        can ask for them, or they are too many."""
        ended: list[Sequence] = []
        for sequence in sequences:
            if _is_resumable(sequence):
                self._orphans[sequence] = None
            else:
                ended.append(sequence)
        while len(self._orphans) > self._orphans_max:
            oldest = self._oldest_of_most()
            self._forget(oldest)
            ended.append(oldest)
        return ended

    def drop(self, origin: Origin) -> None:
        """What is left of the orphans of this connection was not asked for in time. Those that
        still run are the caller's to end."""
        for sequence in [s for s in self._orphans if s.origin == origin]:
            self._forget(sequence)

    def find(self, submit: Submit) -> Sequence | None:
        """The sequence that has, or is about to have, the tokens that `submit` asks for."""
        found = self._streams.get(submit.stream_key) if submit.stream_key else None
        if found is None or not _is_same(found, submit):
            return None
        if found.session == submit.session and found not in self._orphans:
            return None  # its own gateway wants it anew
        return found

    def is_orphan(self, sequence: Sequence) -> bool:
        return sequence in self._orphans

    def take(self, sequence: Sequence) -> FinishReason | None:
        """It has a gateway again. Returns why it has ended, if it has: it stays known until it is
        dropped."""
        finish = self._orphans.get(sequence)
        if finish is None:
            self._orphans.pop(sequence, None)
        return finish

    def _forget(self, sequence: Sequence) -> None:
        self._orphans.pop(sequence, None)
        if self._streams.get(sequence.stream_key) is sequence:
            del self._streams[sequence.stream_key]

    def _oldest_of_most(self) -> Sequence:
        counts = Counter(sequence.scheduling.tenant for sequence in self._orphans)
        most = max(counts.values())
        return next(s for s in self._orphans if counts[s.scheduling.tenant] == most)


def _is_resumable(sequence: Sequence) -> bool:
    """Whether its client has seen a token, which named the stream. Log-probabilities are not
    kept."""
    return (
        bool(sequence.stream_key) and sequence.next_index > 0 and sequence.sampling.logprobs is None
    )


def _is_same(sequence: Sequence, submit: Submit) -> bool:
    return (
        _is_resumable(sequence)
        and sequence.scheduling.tenant == submit.scheduling.tenant
        and sequence.num_prompt == len(submit.tokens) - submit.num_emitted
        and sequence.sampling == submit.sampling
        and sequence.tokens[: len(submit.tokens)] == list(submit.tokens)
    )


def missed_tokens(sequence: Sequence, submit: Submit, finish: FinishReason | None) -> SessionTokens:
    """The reply to who takes it over: all tokens from the first that is wanted."""
    ids = tuple(sequence.tokens[len(submit.tokens) :])
    return replace(
        sequence.reply(ids, index=submit.num_emitted, finish=finish),
        session=submit.session,
        attempt=submit.attempt,
        taken_over=True,
    )
