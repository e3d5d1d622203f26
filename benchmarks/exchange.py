"""Times dispatch + combine between real rank processes on one host, over Mooncake and through
shared memory in turn. Prints one row for each path, number of ranks and tokens.

    python -m benchmarks.exchange --ranks 2 4 --tokens 1 8 32
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from shared.expert_map import ExpertMap
from shared.types import Epoch, Incarnation, Member, RankId, Step, SuspicionReason
from shared.wire import RegionOpened

_WARMUP = 50
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Microseconds for dispatch + combine of one layer, each time of the slowest rank."""

    path: str
    ranks: int
    tokens: int  # per rank
    p50_us: float
    p99_us: float
    cpu_us: float  # of all ranks together, per dispatch + combine


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    ranks: int
    tokens: int
    hidden: int
    top_k: int
    experts: int
    repeats: int
    shares_memory: bool


class _NoFaultMonitor:
    """A StepMonitor for a run without faults."""

    def newest_epoch(self) -> Epoch:
        return Epoch(1)

    def beat(self, waiting_for: Sequence[RankId]) -> None:
        pass

    def suspect(self, rank: RankId, reason: SuspicionReason, detail: str) -> None:
        pass


def run(case: _Case) -> Row:
    """One row of the table: experts are spread evenly, each on one rank."""
    ranks = case.ranks
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(ranks)]
    children = [
        context.Process(target=_rank, args=(case, rank, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    try:
        for child in children:
            child.start()
        for _, theirs in pipes:
            theirs.close()
        ours = [mine for mine, _ in pipes]
        names = _collect(ours)
        _broadcast(ours, names)
        regions = [region for given in _collect(ours) for region in given]
        _broadcast(ours, regions)
        results = _collect(ours)
    finally:
        for child in children:
            child.kill()
            child.join()
    slowest_us = np.max([spent for spent, _ in results], axis=0) * 1e6
    cpu_us = sum(cpu for _, cpu in results) / case.repeats * 1e6
    return Row(
        path="memory" if case.shares_memory else "Mooncake",
        ranks=ranks,
        tokens=case.tokens,
        p50_us=float(np.percentile(slowest_us, 50)),
        p99_us=float(np.percentile(slowest_us, 99)),
        cpu_us=cpu_us,
    )


def table(rows: Sequence[Row]) -> str:
    names = ("path", "ranks", "tokens/rank", "p50 µs", "p99 µs", "CPU µs, all")
    cells = [
        (r.path, r.ranks, r.tokens, round(r.p50_us), round(r.p99_us), round(r.cpu_us)) for r in rows
    ]
    lines = [" ".join(f"{cell:>11}" for cell in line) for line in (names, *cells)]
    return "\n".join(lines)


def _collect(pipes: Sequence[Connection]) -> list:  # type: ignore[type-arg]
    results = []
    for rank, pipe in enumerate(pipes):
        if not pipe.poll(_TIMEOUT_S):
            raise TimeoutError(f"rank {rank} of the benchmark does not answer")
        results.append(pipe.recv())
    return results


def _broadcast(pipes: Sequence[Connection], value: object) -> None:
    for pipe in pipes:
        pipe.send(value)


def _rank(case: _Case, rank: int, pipe: Connection) -> None:
    from gpu_worker.exchange.links import TransferEndpoint
    from gpu_worker.exchange.message import MessageLayout
    from gpu_worker.exchange.transfer import TransferExchange
    from shared.clock import SystemClock

    members = [Member(rank=RankId(r), incarnation=Incarnation(1)) for r in range(case.ranks)]
    own = members[rank]
    layout = MessageLayout(
        hidden_size=case.hidden, top_k=case.top_k, step_tokens_max=max(case.tokens, 1)
    )
    endpoint = TransferEndpoint(
        "127.0.0.1", layout, SystemClock(), shares_memory=case.shares_memory
    )
    pipe.send(endpoint.name)
    pipe.recv()
    given = []
    for source in members:
        if source != own:
            region = endpoint.open_region(source, 1)
            given.append(
                RegionOpened(
                    target=own,
                    source=source,
                    generation=1,
                    transfer_name=endpoint.name,
                    address=region.address,
                    nbytes=region.nbytes,
                    memory=region.memory,
                )
            )
    pipe.send(given)
    for region in pipe.recv():
        if region.source == own:
            endpoint.connect(region)
    exchange = TransferExchange(endpoint, own, _NoFaultMonitor(), SystemClock(), 1e9)
    expert_map = _even_map(case, members)
    exchange.adopt(expert_map)
    rng = np.random.default_rng(rank)
    x_TH = rng.standard_normal((case.tokens, case.hidden), dtype=np.float32)
    spent: NDArray[np.float64] = np.zeros(case.repeats)
    cpu_from = 0.0
    for step in range(-_WARMUP, case.repeats):
        order_TE = rng.random((case.tokens, case.experts)).argsort(axis=1)
        experts_TK: NDArray[np.int32] = order_TE[:, : case.top_k].astype(np.int32)
        if step == 0:
            cpu_from = time.process_time()
        exchange.begin_step(Epoch(1), Step(step + _WARMUP), num_tokens=case.tokens, has_work=True)
        began = time.perf_counter()
        arrived = exchange.dispatch(0, x_TH, experts_TK)
        exchange.combine(0, arrived.x_MH[arrived.rows_N])
        if step >= 0:
            spent[step] = time.perf_counter() - began
    cpu = time.process_time() - cpu_from
    pipe.send((spent, cpu))
    pipe.poll(_TIMEOUT_S)


def _even_map(case: _Case, members: Sequence[Member]) -> ExpertMap:
    slots = -(-case.experts // case.ranks)
    placement = np.full((1, case.ranks, slots), -1, dtype=np.int16)
    placement.reshape(-1)[: case.experts] = np.arange(case.experts)
    return ExpertMap(
        epoch=Epoch(1),
        num_experts=case.experts,
        members=tuple(members),
        placement=placement,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1000)
    args = parser.parse_args()
    rows = [
        run(
            _Case(
                ranks=ranks,
                tokens=tokens,
                hidden=args.hidden,
                top_k=args.top_k,
                experts=args.experts,
                repeats=args.repeats,
                shares_memory=shares_memory,
            )
        )
        for ranks in args.ranks
        for tokens in args.tokens
        for shares_memory in (False, True)
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
