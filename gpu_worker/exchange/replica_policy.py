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
NO_SLOT = -1
"""In a table of physical slots: tokens go to no expert."""
SPREAD_TURNS = 12
"""So many tokens in a row may go to different replicas. Divisible by most numbers of holders."""
_LAYER_STRIDE = 31


class ReplicaPolicy(Enum):
    """GATHER: all ranks send an expert's tokens to one replica, so that its weights are read once a
    step; the other replicas are spare. Best if reading weights limits the step: on CPUs, and with
    few tokens for each expert. SPREAD: a rank uses its own replica, or else all replicas in turn,
    token by token. Best if arithmetic limits the step."""

    GATHER = "gather"
    SPREAD = "spread"


class ReplicaChoice(NamedTuple):
    """For every layer L, turn U and expert E the rank and its local slot; UNCOVERED if no member
    holds the expert. Token t of a step takes turn t modulo U."""

    rank_LUE: NDArray[np.int32]
    slot_LUE: NDArray[np.int32]


def num_turns(policy: ReplicaPolicy) -> int:
    return SPREAD_TURNS if policy is ReplicaPolicy.SPREAD else 1


def choose_replicas(
    expert_map: ExpertMap, own_rank: RankId, policy: ReplicaPolicy = ReplicaPolicy.GATHER
) -> ReplicaChoice:
    slot_LRE = _first_slots(expert_map)
    is_member_R = np.zeros(expert_map.num_ranks, dtype=bool)
    is_member_R[[m.rank for m in expert_map.members]] = True
    holds_LRE = (slot_LRE >= 0) & is_member_R[None, :, None]
    if policy is ReplicaPolicy.GATHER:
        rank_LUE = _gather(holds_LRE)[:, None, :]
    else:
        rank_LUE = _spread(holds_LRE, is_member_R, own_rank)
    slot_LUE = np.take_along_axis(slot_LRE, np.maximum(rank_LUE, 0), axis=1)
    slot_LUE = np.where(rank_LUE == UNCOVERED, UNCOVERED, slot_LUE).astype(np.int32)
    return ReplicaChoice(
        np.ascontiguousarray(rank_LUE, dtype=np.int32), np.ascontiguousarray(slot_LUE)
    )


def _gather(holds_LRE: NDArray[np.bool_]) -> NDArray[np.int64]:
    """`[L, E]`: one holder for each expert, the same on every rank. Experts with the fewest holders
    are assigned first, each to the holder that has the fewest experts so far.

    Everybody waits for this after a death, so experts that leave no choice are assigned at once."""
    layers, num_ranks, experts = holds_LRE.shape
    num_holders_LE = holds_LRE.sum(axis=1)
    order_LE = np.argsort(num_holders_LE, axis=1, kind="stable")
    layer_L = np.arange(layers)
    holds_ELR = np.ascontiguousarray(holds_LRE[layer_L[:, None], :, order_LE].transpose(1, 0, 2))
    no_choice = int((num_holders_LE <= 1).sum(axis=1).min())  # for the first so many of each layer
    taken_LR = holds_ELR[:no_choice].sum(axis=0)
    taken_N, first_L = taken_LR.reshape(-1), layer_L * num_ranks  # a view, for cheap additions
    chosen_EL = holds_ELR.argmax(axis=2)
    excluded_ELR = np.where(holds_ELR, 0, experts + 1)
    covered_EL: NDArray[np.bool_] = num_holders_LE[layer_L, order_LE.T] > 0
    for turn in range(no_choice, experts):
        chosen_L = (taken_LR + excluded_ELR[turn]).argmin(axis=1)
        chosen_EL[turn] = chosen_L
        taken_N[first_L + chosen_L] += covered_EL[turn]
    rank_LE = np.empty((layers, experts), dtype=np.int64)
    rank_LE[layer_L, order_LE.T] = np.where(covered_EL, chosen_EL, UNCOVERED)
    return rank_LE


def _spread(
    holds_LRE: NDArray[np.bool_], is_member_R: NDArray[np.bool_], own_rank: RankId
) -> NDArray[np.int64]:
    """`[L, U, E]`: the rank itself if it holds the expert, because that costs no message. The turns
    of all ranks without the expert are dealt to its holders, starting at a different holder for
    each expert, so that holders are loaded evenly."""
    layers, _, experts = holds_LRE.shape
    layer_N, expert_N, holder_N = np.nonzero(holds_LRE.transpose(0, 2, 1))
    num_holders_LE = np.bincount(layer_N * experts + expert_N, minlength=layers * experts)
    first_LE = (np.cumsum(num_holders_LE) - num_holders_LE).reshape(layers, 1, experts)
    num_holders_LE = num_holders_LE.reshape(layers, 1, experts)
    turn_LUE = _turns(holds_LRE, is_member_R, own_rank) % np.maximum(num_holders_LE, 1)
    holder_N = np.append(holder_N, UNCOVERED)  # for the index of an expert without holders
    rank_LUE = np.where(num_holders_LE > 0, holder_N[first_LE + turn_LUE], UNCOVERED)
    return np.where(holds_LRE[:, None, own_rank, :], own_rank, rank_LUE)


def _first_slots(expert_map: ExpertMap) -> NDArray[np.int32]:
    """`[L, R, E]`: the rank's lowest slot that holds the expert, or -1."""
    computed = expert_map.computed
    layers, ranks, _ = computed.shape
    result = np.full((layers, ranks, expert_map.num_experts), -1, dtype=np.int32)
    layer_N, rank_N, slot_N = (index_N[::-1] for index_N in np.nonzero(computed >= 0))
    # Of a slot that comes twice the last one written stays, which is the lowest.
    result[layer_N, rank_N, computed[layer_N, rank_N, slot_N]] = slot_N
    return result


def _turns(
    holds_LRE: NDArray[np.bool_], is_member_R: NDArray[np.bool_], own_rank: RankId
) -> NDArray[np.int64]:
    """`[L, U, E]`: the numbers of `own_rank`'s turns among those of all ranks without the expert.
    To deal them, take the remainder by the number of holders."""
    layers, _, experts = holds_LRE.shape
    lacking_before_LE = (~holds_LRE & is_member_R[None, :, None])[:, :own_rank].sum(axis=1)
    start_LE = _LAYER_STRIDE * np.arange(layers)[:, None] + np.arange(experts)[None, :]
    first_LE = SPREAD_TURNS * lacking_before_LE + start_LE
    turn_LUE: NDArray[np.int64] = first_LE[:, None, :] + np.arange(SPREAD_TURNS)[None, :, None]
    return turn_LUE
