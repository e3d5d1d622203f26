"""Which replica of each expert a rank sends its tokens to. This changes only who computes, never
the result: every replica has the same weights. Pure."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.expert_map import ExpertMap
from shared.types import RankId

UNCOVERED = -1
_LAYER_STRIDE = 31


class ReplicaPolicy(Enum):
    """GATHER: all ranks send an expert's tokens to one replica, so that its weights are read once a
    step; the other replicas are spare. Best if reading weights limits the step: on CPUs, and with
    few tokens for each expert. SPREAD: the ranks use all replicas, each rank its own or a fair
    share. Best if arithmetic limits the step."""

    GATHER = "gather"
    SPREAD = "spread"


class ReplicaChoice(NamedTuple):
    """For every layer L and expert E the rank and its local slot; UNCOVERED if no member holds the
    expert."""

    rank_LE: NDArray[np.int32]
    slot_LE: NDArray[np.int32]


def choose_replicas(
    expert_map: ExpertMap, own_rank: RankId, policy: ReplicaPolicy = ReplicaPolicy.GATHER
) -> ReplicaChoice:
    slot_LRE = _first_slots(expert_map)
    is_member_R = np.zeros(expert_map.num_ranks, dtype=bool)
    is_member_R[[m.rank for m in expert_map.members]] = True
    holds_LRE = (slot_LRE >= 0) & is_member_R[None, :, None]
    if policy is ReplicaPolicy.GATHER:
        rank_LE = _gather(holds_LRE)
    else:
        rank_LE = _spread(holds_LRE, is_member_R, own_rank)
    slot_LE = np.take_along_axis(slot_LRE, np.maximum(rank_LE, 0)[:, None, :], axis=1)[:, 0, :]
    slot_LE = np.where(rank_LE == UNCOVERED, UNCOVERED, slot_LE).astype(np.int32)
    return ReplicaChoice(
        np.ascontiguousarray(rank_LE, dtype=np.int32), np.ascontiguousarray(slot_LE)
    )


def _gather(holds_LRE: NDArray[np.bool_]) -> NDArray[np.int64]:
    """`[L, E]`: one holder for each expert, the same on every rank. Experts with the fewest holders
    are assigned first, each to the holder that has the fewest experts so far."""
    layers, num_ranks, experts = holds_LRE.shape
    order_LE = np.argsort(holds_LRE.sum(axis=1), axis=1, kind="stable")
    taken_LR = np.zeros((layers, num_ranks), dtype=np.int64)
    rank_LE = np.full((layers, experts), UNCOVERED, dtype=np.int64)
    layer_L = np.arange(layers)
    for expert_L in order_LE.T:
        holds_LR = holds_LRE[layer_L, :, expert_L]
        chosen_L = np.where(holds_LR, taken_LR, np.iinfo(np.int64).max).argmin(axis=1)
        covered_L = holds_LR.any(axis=1)
        rank_LE[layer_L, expert_L] = np.where(covered_L, chosen_L, UNCOVERED)
        taken_LR[layer_L, chosen_L] += covered_L
    return rank_LE


def _spread(
    holds_LRE: NDArray[np.bool_], is_member_R: NDArray[np.bool_], own_rank: RankId
) -> NDArray[np.int64]:
    """`[L, E]`: the rank itself if it holds the expert, because that costs no message. The ranks
    without the expert are assigned to its holders in turn, starting at a different holder for each
    expert, so that holders are loaded evenly."""
    turn_LE = _turns(holds_LRE, is_member_R, own_rank)
    order_LRE = np.cumsum(holds_LRE, axis=1) - 1
    chosen_LRE = holds_LRE & (order_LRE == turn_LE[:, None, :])
    rank_LE = np.where(chosen_LRE.any(axis=1), chosen_LRE.argmax(axis=1), UNCOVERED)
    return np.where(holds_LRE[:, own_rank, :], own_rank, rank_LE)


def _first_slots(expert_map: ExpertMap) -> NDArray[np.int32]:
    """`[L, R, E]`: the rank's lowest slot that holds the expert, or -1."""
    layers, ranks, slots = expert_map.placement.shape
    result = np.full((layers, ranks, expert_map.num_experts), -1, dtype=np.int32)
    for slot in reversed(range(slots)):
        layer_N, rank_N = np.nonzero(expert_map.placement[:, :, slot] >= 0)
        result[layer_N, rank_N, expert_map.placement[layer_N, rank_N, slot]] = slot
    return result


def _turns(
    holds_LRE: NDArray[np.bool_], is_member_R: NDArray[np.bool_], own_rank: RankId
) -> NDArray[np.int64]:
    """`[L, E]`: the index, in the order of ranks, of the holder that serves `own_rank`."""
    layers, _, experts = holds_LRE.shape
    lacking_before_LE = (~holds_LRE & is_member_R[None, :, None])[:, :own_rank].sum(axis=1)
    start_LE = _LAYER_STRIDE * np.arange(layers)[:, None] + np.arange(experts)[None, :]
    num_holders_LE = np.maximum(holds_LRE.sum(axis=1), 1)
    turn_LE: NDArray[np.int64] = (lacking_before_LE + start_LE) % num_holders_LE
    return turn_LE
