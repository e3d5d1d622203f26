"""How many tokens of each tenant fit into one step, so that none of them makes the steps of the
others much longer. Pure.

All ranks step together, and a step takes the longer the more tokens it has: a tenant that runs many
sequences, or has long prompts, holds up the next token of everybody. So while a step has others to
serve as well, here or on another rank, a tenant has at most `tokens` a step for its weight, or as
many as the one that decodes least besides it. What it leaves is kept for it for a few steps, so
that who asks for little has a short prompt computed at once. Its sequences take turns. A tenant
that is alone is not limited.

Tokens that the host draws one by one may take as long as a whole step of the others: of these a
tenant has at most `host_rows` a step for its weight, and no more than fit into a part of a step by
what they have cost so far (`draw_costs`), on the same terms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from gpu_worker.engine.draw import may_need_logits
from gpu_worker.engine.draw_costs import DrawCosts
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

    def __init__(self, tokens: int, *, host_rows: int = NO_LIMIT) -> None:
        self._tokens = tokens
        self._host_rows = host_rows
        self.draw_costs = DrawCosts(host_rows)
        """Told what the draws of each step have cost."""
        self._rows: Counter[str] = Counter()  # those that decode here, by tenant
        self._wanting: Counter[str] = Counter()  # those of them whose tokens the host draws
        self._drawn: Counter[str] = Counter()  # of these, and of prompts, in this step
        self._accounts: dict[str, _Account] = {}
        self._step = 0
        self._present: Collection[str] = ()

    def begin(self, decoding: Iterable[Sequence], elsewhere: Collection[str]) -> None:
        """`decoding`: what could decode in this step. `elsewhere`: tenants that have sessions in
        flight on any rank, as far as gateways told."""
        if not self._limits_any:
            return
        self._step += 1
        self._drawn.clear()
        could = list(decoding)
        self._rows = Counter(sequence.scheduling.tenant for sequence in could)
        if self._host_rows < NO_LIMIT:
            self._wanting = Counter(
                s.scheduling.tenant for s in could if may_need_logits(s.sampling)
            )
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
            most, most_drawn = self.left(first), self._draws_each_step(first)
            if tenant in also_prefill:
                most, most_drawn = max(1, most // 2), max(1, most_drawn // 2)
            if len(rows) > most or self._wanting[tenant] > most_drawn:
                rows.sort(key=lambda row: row[0].decoded_in)
            rows = self._drawable(rows, most, most_drawn)
            if not self._is_alone(tenant):
                for sequence, _ in rows:
                    sequence.decoded_in = self._step
            self.take(first, len(rows))
            chosen += rows
        return chosen

    def left(self, sequence: Sequence) -> int:
        """Tokens that its tenant may still have in this step."""
        if self._tokens == NO_LIMIT or self._is_alone(sequence.scheduling.tenant):
            return NO_LIMIT
        return int(self._account(sequence).tokens)

    def may_draw(self, sequence: Sequence) -> bool:
        """Whether its next token may be drawn in this step."""
        if not self._needs_host(sequence):
            return True
        return self._drawn[sequence.scheduling.tenant] < self._draws_each_step(sequence)

    def _draws_each_step(self, sequence: Sequence) -> int:
        """Tokens of its tenant that the host may draw in a step."""
        tenant, weight = sequence.scheduling.tenant, sequence.scheduling.weight
        if self._host_rows == NO_LIMIT or self._is_alone(tenant):
            return NO_LIMIT
        others = [self._wanting[other] for other in self._rows if other != tenant]
        return max(self.draw_costs.rows(weight), min(others, default=0))

    def take_draw(self, sequence: Sequence) -> None:
        """Its next token is drawn in this step."""
        if self._needs_host(sequence):
            self._drawn[sequence.scheduling.tenant] += 1

    def _drawable(self, rows: list[Decode], most: int, most_drawn: int) -> list[Decode]:
        """The first, at most so many, and of those that the host draws."""
        if most >= len(rows) and most_drawn == NO_LIMIT:
            return rows
        found: list[Decode] = []
        num_drawn = 0
        for row in rows:
            is_drawn = self._needs_host(row[0])
            if len(found) < most and not (is_drawn and num_drawn >= most_drawn):
                found.append(row)
                num_drawn += is_drawn
                self.take_draw(row[0])
        return found

    def _needs_host(self, sequence: Sequence) -> bool:
        return self._host_rows < NO_LIMIT and may_need_logits(sequence.sampling)

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        """Also of a tenant that is alone: the next one comes to a step that is not full of it."""
        if self._tokens < NO_LIMIT:
            account = self._account(sequence)
            account.tokens = max(0.0, account.tokens - num_tokens)

    def _is_alone(self, tenant: str) -> bool:
        return not self._limits_any or not any(other != tenant for other in self._present)

    @property
    def _limits_any(self) -> bool:
        return min(self._tokens, self._host_rows) < NO_LIMIT

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
