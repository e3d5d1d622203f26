"""What each tenant gets of this rank: how many tokens it was served, and how many of its sequences
run. The scheduler tells it what happens, and asks who is next.

Among those that wait, a request in mid-stream comes first, then its priority counts, then its
tenant: who has been served fewest tokens for its weight is next. This also decides whose prompts
get a part of the step. A new sequence of the tenant that was served least may exceed `running_max`
if that tenant runs less than its part of it, so nobody waits until answers to other tenants end,
unless these hold the KV blocks. Nobody who runs is stopped for the sake of a share. But if
KV blocks run out, it is the tenant that runs most that gives up a sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from gpu_worker.engine.sequence import Sequence, SequenceState
from shared.fair_share import FairShare


class TenantShares:
    """Served are the prompt tokens that a new sequence has to compute, all when it begins to run,
    and each token that it generates. What a death or a preemption makes the rank compute again is
    not the tenant's doing, and is not charged."""

    def __init__(self) -> None:
        self._fair = FairShare()
        self._num_running: Counter[str] = Counter()

    def enter(self, sequence: Sequence) -> None:
        scheduling = sequence.scheduling
        self._fair.enter(scheduling.tenant, scheduling.weight)

    def leave(self, sequence: Sequence) -> None:
        """It has ended and does not run any more."""
        self._fair.leave(sequence.scheduling.tenant)

    def begin(self, sequence: Sequence) -> None:
        """It runs from the step that is being planned on. Its cached tokens are known."""
        tenant = sequence.scheduling.tenant
        self._num_running[tenant] += 1
        if sequence.num_emitted == 0 and not sequence.is_charged:
            sequence.num_charged = sequence.num_pending
            self._fair.charge(tenant, sequence.num_charged)

    def confirm(self, sequence: Sequence) -> None:
        """Its first step is committed."""
        sequence.is_charged = True

    def take_back(self, sequence: Sequence) -> None:
        """The step in which it began was abandoned; `stop` follows."""
        if not sequence.is_charged:
            self._fair.charge(sequence.scheduling.tenant, -sequence.num_charged)
            sequence.num_charged = 0

    def stop(self, sequence: Sequence) -> None:
        """It runs no more."""
        tenant = sequence.scheduling.tenant
        self._num_running[tenant] -= 1
        if not self._num_running[tenant]:
            del self._num_running[tenant]

    def charge_tokens(self, sequences: Iterable[Sequence]) -> None:
        """Those that still run get a token each."""
        num_tokens: dict[str, int] = {}
        for sequence in sequences:
            if sequence.state is SequenceState.RUNNING:
                tenant = sequence.scheduling.tenant
                num_tokens[tenant] = num_tokens.get(tenant, 0) + 1
        for tenant, amount in num_tokens.items():
            self._fair.charge(tenant, amount)

    def may_exceed(self, sequence: Sequence, running_max: int) -> bool:
        """Whether its tenant may run one more although so many run: none that runs was served less,
        and it stays within its part of `running_max`, which is at least one."""
        tenant = sequence.scheduling.tenant
        own = self._fair.virtual_time(tenant)
        if any(self._fair.virtual_time(other) < own for other in self._num_running):
            return False
        part = self._fair.part_of(tenant) * running_max
        return self._num_running[tenant] + 1 <= max(1.0, part)

    def sort_running(self, running: list[Sequence]) -> None:
        """The last is preempted first: the least urgent, then of the tenant that runs most for its
        weight, then the latest."""
        if len(self._num_running) < 2:
            running.sort(key=lambda sequence: sequence.priority)
            return

        def keeping_order(sequence: Sequence) -> tuple[bool, int, float, int]:
            is_new, priority, arrival = sequence.priority
            scheduling = sequence.scheduling
            excess = self._num_running[scheduling.tenant] / scheduling.weight
            return (is_new, priority, excess, arrival)

        running.sort(key=keeping_order)

    def order(self, sequence: Sequence) -> tuple[bool, int, float, int, int]:
        """Lower is served first: clients in mid-stream, then the more urgent, then the tenant that
        has been served least, or that runs less."""
        is_new, priority, arrival = sequence.priority
        tenant = sequence.scheduling.tenant
        num_running = self._num_running.get(tenant, 0)
        return (is_new, priority, self._fair.virtual_time(tenant), num_running, arrival)

    def is_ahead(self, sequence: Sequence, other: Sequence) -> bool:
        """Whether it comes before `other` for a better reason than its arrival."""
        return self.order(sequence)[:-1] < self.order(other)[:-1]

    def in_order(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        return sorted(sequences, key=self.order)
