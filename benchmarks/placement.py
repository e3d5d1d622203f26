"""Compares the planner with EPLB as published (`benchmarks.eplb`): balance, replicas moved and
experts lost at a death, and the time to plan. Then measures `shrink` after one and after many
deaths.

    python -m benchmarks.placement [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.eplb import Grouping, eplb
from control_plane.placement import (
    balance,
    compute_fault_tolerance,
    place,
    rank_loads,
    replica_counts,
    shrink,
)
from shared.expert_map import ExpertMap, Placement
from shared.types import Epoch, Incarnation, Member, NodeId, RankId

REPEATS = 7


class Case(NamedTuple):
    name: str
    layers: int
    ranks: int
    nodes: int
    slots: int
    redundant: int
    draw: Callable[[np.random.Generator], NDArray[np.float64]]

    @property
    def node_of(self) -> dict[RankId, NodeId]:
        return {RankId(r): NodeId(f"{r * self.nodes // self.ranks:04}") for r in range(self.ranks)}


def lognormal(sigma: float) -> Callable[[np.random.Generator], NDArray[np.float64]]:
    return lambda random: random.lognormal(0.0, sigma, 256)


def zipf(exponent: float) -> Callable[[np.random.Generator], NDArray[np.float64]]:
    return lambda random: random.permutation(1.0 / np.arange(1, 257) ** exponent)


CASES = (
    *(Case(f"lognormal {s}", 61, 32, 4, 16, 256, lognormal(s)) for s in (0.3, 0.7, 1.0)),
    *(Case(f"zipf {s}", 61, 32, 4, 16, 256, zipf(s)) for s in (0.5, 1.0)),
    Case("lognormal 0.7, +32", 61, 32, 4, 9, 32, lognormal(0.7)),
    Case("lognormal 0.7, +64, a spare slot", 61, 32, 4, 11, 64, lognormal(0.7)),
    Case("lognormal 0.7, 1024 ranks x 1", 58, 1024, 128, 1, 768, lognormal(0.7)),
    Case("lognormal 0.7, 1024 ranks x 2", 58, 1024, 128, 2, 1792, lognormal(0.7)),
)

ONE_SHORT = Case("256 + 32, no spare slot", 61, 32, 4, 9, 32, lognormal(0.7))
ONE_SPARE = Case("256 + 64, a spare slot a rank", 61, 32, 4, 11, 64, lognormal(0.7))
HALF_SPARE = Case("256 + 0, 8 spare slots a rank", 61, 32, 4, 16, 0, lognormal(0.7))
DOUBLED = Case("256 + 256, no spare slot", 61, 32, 4, 16, 256, lognormal(0.7))
SKEWED = Case("256 + 256, zipf 1.0, no spare slot", 61, 32, 4, 16, 256, zipf(1.0))
DEATHS = (
    (DOUBLED, {3}),
    (DOUBLED, set(range(0, 32, 2))),
    (SKEWED, {3}),
    (ONE_SHORT, {3}),
    (ONE_SHORT, {3, 9, 20}),
    (ONE_SPARE, set(range(8))),
    (HALF_SPARE, {3}),
    (HALF_SPARE, set(range(16))),
)


def measure(case: Case) -> Iterator[dict[str, object]]:
    """One row for each planner: ours, ours with a guarantee, and EPLB's two policies."""
    loads = _draw(case)
    ranks, nodes = sorted(case.node_of), case.node_of
    slots = dict.fromkeys(ranks, case.slots)

    def ours(alive: list[RankId], survive: int) -> Placement:
        kept = {r: slots[r] for r in alive}
        return place(
            loads,
            alive,
            nodes,
            kept,
            redundant=case.redundant,
            num_ranks=case.ranks,
            survive=survive,
        ).placement

    planners: list[tuple[str, Callable[[], Placement]]] = [
        ("starfish", lambda: ours(ranks, 0)),
        ("starfish --survive 1", lambda: ours(ranks, 1)),
    ]
    filled = (256 + case.redundant) // case.ranks
    for grouping in (Grouping.GLOBAL, Grouping.HIERARCHICAL):
        planners.append(
            (
                f"EPLB {grouping.value}",
                partial(eplb, loads, case.ranks, case.nodes, filled, grouping),
            )
        )
    for name, planner in planners:
        times = []
        for _ in range(REPEATS if name.startswith("starfish") else 1):
            begin = time.process_time()
            placement = planner()
            times.append(time.process_time() - begin)
        yield {
            "case": case.name,
            "planner": name,
            "plan_ms": round(statistics.median(times) * 1000, 1),
            **_quality(case, placement, loads),
            **_death(case, name, placement, loads, filled),
        }


def measure_shrink(case: Case, dead: Collection[int]) -> dict[str, object]:
    """How many experts the survivors load before serving goes on, and the one that loads most."""
    loads, ranks = _draw(case), sorted(case.node_of)
    slots = dict.fromkeys(ranks, case.slots)
    placement = place(loads, ranks, case.node_of, slots, redundant=case.redundant).placement
    expert_map = _map_of(case, placement)
    times = []
    for _ in range(REPEATS):
        begin = time.process_time()
        result = shrink(expert_map, {RankId(r) for r in dead}, loads)
        times.append(time.process_time() - begin)
    alive = [r for r in ranks if r not in dead]
    per_rank = np.bincount([r.rank for r in result.slot_fills], minlength=case.ranks)[alive]
    return {
        "case": case.name,
        "deaths": len(dead),
        "shrink_ms": round(statistics.median(times) * 1000, 1),
        "loaded": len(result.slot_fills),
        "mean_load": round(float(per_rank.mean()), 1),
        "longest_load": int(per_rank.max()),
        "one_replica": int((replica_counts(result.refilled, 256) == 1).sum()),
        "balance_after": round(float(balance(result.refilled, loads, alive).mean()), 3),
    }


def _draw(case: Case) -> NDArray[np.float64]:
    random = np.random.default_rng(7)
    return np.stack([case.draw(random) for _ in range(case.layers)])


def _quality(case: Case, placement: Placement, loads: NDArray[np.float64]) -> dict[str, object]:
    ranks = sorted(case.node_of)
    tolerance = compute_fault_tolerance(_map_of(case, placement), case.node_of)
    peak = balance(placement, loads, ranks)
    # With these replica counts no packing beats the mean, or the hottest replica on its own.
    hottest = (loads / replica_counts(placement, 256)).max(axis=1)
    bound = np.maximum(1.0, hottest / (loads.sum(axis=1) / case.ranks))
    return {
        "balance_mean": round(float(peak.mean()), 4),
        "balance_max": round(float(peak.max()), 4),
        "over_bound": round(float((peak / bound).mean()), 4),
        "rank_failures": tolerance.rank_failures,
        "node_failures": tolerance.node_failures,
        "lost_with_a_rank": max(tolerance.lost_by_rank.values()),
        "lost_with_a_node": max(tolerance.lost_by_node.values()),
    }


def _death(
    case: Case, name: str, placement: Placement, loads: NDArray[np.float64], filled: int
) -> dict[str, object]:
    """The effect of the death of rank 3: surviving replicas that leave their rank, experts that
    survivors load (the order of slots in a rank is free, which favours EPLB), and the balance right
    after."""
    dead = RankId(3)
    alive = [r for r in sorted(case.node_of) if r != dead]
    before = placement[:, alive]
    if name.startswith("starfish"):
        after = shrink(_map_of(case, placement), {dead}, loads).refilled[:, alive]
    else:
        after = eplb(loads, len(alive), 1, filled, Grouping.GLOBAL)
    held_before, held_after = _held(before), _held(after)
    stayed = np.minimum(held_before, held_after)
    kept = int(stayed.sum())
    loaded_by_rank = (held_after - stayed).reshape(case.layers, len(alive), -1).sum(axis=(0, 2))
    moved = int(held_before.sum()) - kept
    per_rank = rank_loads(after, loads)
    return {
        "moved_at_death": moved,
        "moved_share": round(moved / int(held_before.sum()), 4),
        "loaded_at_death": int(loaded_by_rank.sum()),
        "longest_load": int(loaded_by_rank.max()),
        "balance_after_death": round(float((per_rank.max(1) / per_rank.mean(1)).mean()), 3),
    }


def _held(rows: Placement) -> NDArray[np.int64]:
    """`[num_layers * num_ranks, 256]`: how often each rank holds each expert."""
    flat = rows.reshape(-1, rows.shape[2]).astype(np.int64)
    keys = np.where(flat >= 0, flat, 256) + np.arange(len(flat))[:, None] * 257
    return np.bincount(keys.ravel(), minlength=len(flat) * 257).reshape(-1, 257)[:, :256]


def _map_of(case: Case, placement: Placement) -> ExpertMap:
    members = tuple(Member(rank=r, incarnation=Incarnation(1)) for r in sorted(case.node_of))
    return ExpertMap(epoch=Epoch(1), num_experts=256, members=members, placement=placement)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    as_json = parser.parse_args().json
    for case in CASES:
        if not as_json:
            print(
                f"\n{case.name}: {case.layers} layers x (256 + {case.redundant}), "
                f"{case.ranks} ranks x {case.slots} slots on {case.nodes} nodes"
            )
        for row in measure(case):
            if as_json:
                print(json.dumps(row), flush=True)
                continue
            columns = [
                f"{key} {value}" for key, value in row.items() if key not in ("case", "planner")
            ]
            print(f"  {row['planner']:22}" + "  ".join(columns), flush=True)
    if not as_json:
        print("\nshrink: 61 layers, 32 ranks on 4 nodes")
    for case, dead in DEATHS:
        row = measure_shrink(case, dead)
        if as_json:
            print(json.dumps(row), flush=True)
        else:
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
