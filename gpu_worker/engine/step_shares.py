"""How many tokens of each tenant fit into one step, so that none of them makes the steps of the
others much longer. Pure.

All ranks step together, and a step takes the longer the more tokens it has: a tenant that runs many
sequences, or has long prompts, holds up the next token of everybody. So while a step has others to
serve as well, here or on another rank, a tenant has at most `tokens` a step for its weight, or as
many as the one that decodes least besides it. What it leaves is kept for it for a few steps, so
that who asks for little has a short prompt computed at once. Its sequences take turns. A tenant
that is alone is not limited."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from gpu_worker.engine.projected_state import ProjectedState
from gpu_worker.engine.scheduler_limits import NO_LIMIT
from gpu_worker.engine.sequence import Sequence

BURST_STEPS = 4
"""For so many steps what a tenant leaves is kept."""
_FORGET_ABOVE = 256

Decode = tuple[Sequence, ProjectedState]


@dataclass(slots=True)
class _Account:
    tokens: float
    as_of: int  # the step in which there were so many left


class StepShares:
    """For each step: `begin`, then `decodes`, then `left` and `take` for each chunk of a prompt.
    A step that is abandoned has been paid for: it costs a tenant a few tokens of a later step."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._accounts: dict[str, _Account] = {}
        self._step = 0
        self._rows: Counter[str] = Counter()  # those that decode here, by tenant
        self._present: Collection[str] = ()

    def begin(self, decoding: Iterable[Sequence], elsewhere: Collection[str]) -> None:
        """`decoding`: what could decode in this step. `elsewhere`: tenants that have sessions in
        flight on any rank, as far as gateways told."""
        if self._tokens == NO_LIMIT:
            return
        self._step += 1
        self._rows = Counter(sequence.scheduling.tenant for sequence in decoding)
        self._present = self._rows.keys() | set(elsewhere)
        if len(self._accounts) > _FORGET_ABOVE:
            self._forget_full()

    def decodes(self, wanted: Items[Decode], also_prefill: Collection[str]) -> Items[Decode]:
        """Those of `wanted` that decode in this step. A tenant of `also_prefill` keeps half for its
        prompts."""
        by_tenant: dict[str, list[Decode]] = {}
        for each in wanted:
            by_tenant.setdefault(each[0].scheduling.tenant, []).append(each)
        chosen: list[Decode] = []
        for tenant, rows in by_tenant.items():
            first = rows[0][0]
            most = self.left(first)
            if tenant in also_prefill:
                most = max(1, most // 2)
            if len(rows) > most:
                rows.sort(key=lambda row: row[0].decoded_in)
                del rows[most:]
            if most < NO_LIMIT // 2:
                for sequence, _ in rows:
                    sequence.decoded_in = self._step
            self.take(first, len(rows))
            chosen += rows
        return chosen

    def left(self, sequence: Sequence) -> int:
        """Tokens that its tenant may still have in this step."""
        if self._is_alone(sequence.scheduling.tenant):
            return NO_LIMIT
        return int(self._account(sequence).tokens)

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        """Also of a tenant that is alone: the next one comes to a step that is not full of it."""
        if self._tokens < NO_LIMIT:
            account = self._account(sequence)
            account.tokens = max(0.0, account.tokens - num_tokens)

    def _is_alone(self, tenant: str) -> bool:
        return self._tokens == NO_LIMIT or not any(other != tenant for other in self._present)

    def _account(self, sequence: Sequence) -> _Account:
        """With what the steps since have added."""
        tenant, weight = sequence.scheduling.tenant, sequence.scheduling.weight
        others = [rows for other, rows in self._rows.items() if other != tenant]
        each_step = max(1.0, self._tokens * weight, min(others, default=0))
        most = BURST_STEPS * each_step
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account(most, self._step)
        num_steps = self._step - account.as_of
        account.tokens = min(most, account.tokens + num_steps * each_step)
        account.as_of = self._step
        return account

    def _forget_full(self) -> None:
        for tenant, account in list(self._accounts.items()):
            if self._step - account.as_of >= BURST_STEPS:
                del self._accounts[tenant]
