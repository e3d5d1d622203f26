"""A model small enough to run thousands of schedules, and exact: integers in float32. Its next
token depends on every token before it (through the paged KV cache) and on every expert asked: a
lost, doubled or foreign contribution changes what the client sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpu_worker.engine.step_batch import Forward, StepBatch
from gpu_worker.exchange.interface import Exchange
from shared.expert_map import Placement
from shared.types import EMPTY_SLOT

NUM_LAYERS = 2
NUM_EXPERTS = 6
TOP_K = 2
HIDDEN = 2
VOCAB = 97
EOS = 96
PRIME = 65521


def key_of(token: int, position: int) -> int:
    return (token * 31 + position * 17 + 5) % PRIME


def experts_of(value: int, layer: int) -> tuple[int, int]:
    first = (value + layer) % NUM_EXPERTS
    return first, (first + 1 + value % (NUM_EXPERTS - 1)) % NUM_EXPERTS


def expert_output(value: int, layer: int, expert: int) -> int:
    return (value * (expert + 3) + 7 * layer + expert) % PRIME


def next_token(tokens: Sequence[int]) -> int:
    """The oracle: what greedy decoding of the model gives, computed without any rank."""
    return token_after(sum(key_of(t, p) * (p + 1) for p, t in enumerate(tokens)) % PRIME)


def token_after(value: int) -> int:
    """That of a prefix, which is summed up in `value`."""
    for layer in range(NUM_LAYERS):
        outputs = [expert_output(value, layer, e) for e in experts_of(value, layer)]
        value = (value + sum((k + 1) * y for k, y in enumerate(outputs))) % PRIME
    return value % EOS


def oracle(prompt: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tuple(tokens[len(prompt) :])


class SimModel:
    """Implements `step_batch.Model`, and `membership.driver.SlotLoader` for its slots. With
    `drafts` it has one layer more and implements `DraftModel`: one guess of three is wrong."""

    def __init__(
        self, *, slots_per_rank: int, kv_blocks: int, block_tokens: int, drafts: bool = False
    ) -> None:
        self.keys = np.full(kv_blocks * block_tokens, -1, dtype=np.int64)
        self.drafts = drafts
        self.num_moe_layers = NUM_LAYERS + drafts
        self._block_tokens = block_tokens
        shape = (self.num_moe_layers, slots_per_rank)
        self.contents: Placement = np.full(shape, EMPTY_SLOT, np.int16)
        self.use_on_demand(np.zeros((0, 0), np.int16))

    def use_on_demand(self, row_LP: Placement) -> None:
        """Empty: nothing."""
        self.on_demand = row_LP if row_LP.size else np.zeros((self.num_moe_layers, 0), np.int16)

    @property
    def vocab_size(self) -> int:
        return VOCAB

    def load(self, wanted: Placement) -> Placement:
        self.contents = wanted.copy()
        return self.contents.copy()

    def forward(self, batch: StepBatch, exchange: Exchange) -> Forward:
        values_T = self._attend(batch)
        any_work = any_tokens = all_know_next = False
        for layer in range(NUM_LAYERS):
            x_TH = np.stack([values_T, values_T], axis=1).astype(np.float32)
            sent = exchange.dispatch(layer, x_TH, _chosen(values_T, layer))
            any_work, any_tokens = sent.any_work, sent.any_tokens
            all_know_next = sent.all_know_next
            if not sent.any_tokens:
                break
            y_TKH = exchange.combine(
                layer, self._experts(layer, sent.x_MH, sent.rows_N, sent.slots_N)
            )
            weighted = y_TKH[:, :, 0].astype(np.int64) * np.arange(1, TOP_K + 1)
            values_T = (values_T + weighted.sum(axis=1)) % PRIME
        logits_RV = self._logits(values_T[batch.logits_rows_R])
        return Forward(
            logits_RV=logits_RV,
            any_work=any_work,
            any_tokens=any_tokens,
            all_know_next=all_know_next,
        )

    def draft(
        self,
        batch: StepBatch,
        next_ids_T: NDArray[np.int32],
        rows_R: NDArray[np.int32],
        exchange: Exchange,
    ) -> NDArray[np.float32]:
        values_T = np.array(
            [
                (self._prefix(batch.block_tables_SB[s], p) + key_of(t, p + 1) * (p + 2)) % PRIME
                for s, p, t in zip(
                    batch.sequence_T.tolist(),
                    batch.position_T.tolist(),
                    next_ids_T.tolist(),
                    strict=True,
                )
            ],
            dtype=np.int64,
        )
        layer = NUM_LAYERS
        chosen_TK = _chosen(values_T, layer)
        x_TH = np.stack([values_T, values_T], axis=1).astype(np.float32)
        sent = exchange.dispatch(layer, x_TH, chosen_TK)
        y_TKH = exchange.combine(layer, self._experts(layer, *sent[:3]))
        expected = [
            [expert_output(v, layer, e) for e in row]
            for v, row in zip(values_T.tolist(), chosen_TK.tolist(), strict=True)
        ]
        assert y_TKH[:, :, 0].tolist() == expected, "not what the experts of the layer give"
        guesses = [token_after(v) + (v % 3 == 0) for v in values_T[rows_R].tolist()]
        return self._logits(np.array(guesses, dtype=np.int64))

    def _attend(self, batch: StepBatch) -> NDArray[np.int64]:
        places = [
            int(batch.block_tables_SB[s, p // self._block_tokens]) * self._block_tokens
            + p % self._block_tokens
            for s, p in zip(batch.sequence_T.tolist(), batch.position_T.tolist(), strict=True)
        ]
        for place, token, position in zip(
            places, batch.token_ids_T.tolist(), batch.position_T.tolist(), strict=True
        ):
            self.keys[place] = key_of(token, position)
        return np.array(
            [
                self._prefix(batch.block_tables_SB[s], p)
                for s, p in zip(batch.sequence_T.tolist(), batch.position_T.tolist(), strict=True)
            ],
            dtype=np.int64,
        )

    def _prefix(self, table_B: NDArray[np.int32], position: int) -> int:
        positions = np.arange(position + 1)
        places = table_B[positions // self._block_tokens] * self._block_tokens
        keys = self.keys[places + positions % self._block_tokens]
        assert (keys >= 0).all(), "attended to KV that was never written"
        return int((keys * (positions + 1)).sum() % PRIME)

    def _experts(
        self,
        layer: int,
        x_MH: NDArray[np.float32],
        rows_N: NDArray[np.int32],
        slots_N: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        experts_N = np.append(self.contents[layer], self.on_demand[layer])[slots_N]
        assert (experts_N >= 0).all(), "asked for an expert that is not resident"
        outputs = [
            expert_output(int(x_MH[row, 0]), layer, int(expert))
            for row, expert in zip(rows_N.tolist(), experts_N.tolist(), strict=True)
        ]
        return np.repeat(np.array(outputs, dtype=np.float32).reshape(-1, 1), HIDDEN, axis=1)

    def _logits(self, values_R: NDArray[np.int64]) -> NDArray[np.float32]:
        logits_RV = np.zeros((len(values_R), VOCAB), dtype=np.float32)
        logits_RV[np.arange(len(values_R)), values_R % EOS] = 10.0
        return logits_RV


def _chosen(values_T: NDArray[np.int64], layer: int) -> NDArray[np.int32]:
    chosen = [experts_of(value, layer) for value in values_T.tolist()]
    return np.array(chosen, dtype=np.int32).reshape(-1, TOP_K)
