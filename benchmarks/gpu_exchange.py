"""Measures dispatch and combine of Mooncake's EP buffer between ranks: whether bf16 arrives
exactly, the error of fp8, and the time of a pair of them in a CUDA graph, with the widening of fp8
rows if a rank does that. If there are more ranks than cards, ranks share cards under CUDA MPS.

    python -m benchmarks.gpu_exchange --ranks 2 --tokens 128 --slots 512
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing as mp
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from cli.up.device import count_gpus
from cli.up.mps import CudaMps
from shared.clock import SystemClock
from shared.errors import StarfishError
from shared.expert_map import ExpertMap
from shared.records import ExchangeHandles
from shared.types import Epoch, Incarnation, Member, RankId

_PAIRS_A_GRAPH = 20
_REPLAYS = 40
_TIMEOUT_MS = 60_000
_RECEIVE_TIMEOUT_S = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    num_ranks: int
    tokens: int
    hidden: int
    slots: int  # of all ranks
    top_k: int

    @property
    def slots_per_rank(self) -> int:
        return self.slots // self.num_ranks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="of a rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--slots", type=int, default=512, help="of all ranks together")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    shape = Shape(
        num_ranks=args.ranks,
        tokens=args.tokens,
        hidden=args.hidden,
        slots=args.slots,
        top_k=args.top_k,
    )
    try:
        with sharing_cards(shape.num_ranks):
            result = measure(shape)
    except StarfishError as error:
        sys.exit(f"gpu_exchange: {error}")
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1))
    for kind, found in result.items():
        print(f"{kind}: {found}")


@contextlib.contextmanager
def sharing_cards(num_ranks: int) -> Iterator[None]:
    """Processes that start inside are clients of an MPS daemon, if they need one."""
    if num_ranks <= asyncio.run(count_gpus()):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="starfish-") as folder:
        (Path(folder) / "logs").mkdir()
        mps = CudaMps(Path(folder))
        asyncio.run(mps.start())
        os.environ.update(mps.environment)
        try:
            yield
        finally:
            asyncio.run(mps.stop())


def measure(shape: Shape) -> dict[str, Any]:
    """The result over all ranks: exact only if all ranks are, the largest error, the longest
    time."""
    context = mp.get_context("spawn")
    pipes, processes = [], []
    for rank in range(shape.num_ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=run_rank, args=(shape, rank, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        result = {}
        for kind in ("bf16", "fp8"):
            for phase in ("handles", "connected", "adopted"):
                gathered = [receive(pipe, phase) for pipe in pipes]
                for pipe in pipes:
                    pipe.send(gathered)
            answers = [receive(pipe, "answer") for pipe in pipes]
            result[kind] = {
                "exact": all(a["exact"] for a in answers),
                "relative_error": max(a["relative_error"] for a in answers),
                "pair_us": max(a["pair_us"] for a in answers),
            }
        return result
    finally:
        for process in processes:
            process.kill()
            process.join()


def receive(pipe: Connection, phase: str) -> Any:
    if not pipe.poll(_RECEIVE_TIMEOUT_S):
        raise TimeoutError(f"a rank did not get as far as {phase!r}")
    said, what = pipe.recv()
    assert said == phase, f"a rank is at {said!r}, not {phase!r}"
    return what


def run_rank(shape: Shape, rank: int, pipe: Connection) -> None:
    import torch

    from gpu_worker.cuda.streams import on_stream

    torch.cuda.set_device(rank % torch.cuda.device_count())
    stream = torch.cuda.Stream()
    with on_stream(stream):
        for fp8 in (False, True):
            pipe.send(("answer", ExchangeRank(shape, rank, pipe, stream, fp8=fp8).run()))
    pipe.poll(_RECEIVE_TIMEOUT_S)  # peers may still look into this process's memory


class ExchangeRank:
    """Each slot multiplies by its own power of two, and weights are eighths. So every product and
    sum is exact in bf16, and results must be equal, not only close."""

    def __init__(self, shape: Shape, rank: int, pipe: Connection, stream: Any, *, fp8: bool):
        import torch

        from gpu_worker.cuda.ep.exchange import EpExchange, EpShape

        self.shape, self.own, self.pipe, self.stream = shape, member(rank), pipe, stream
        self.exchange = EpExchange(
            self.own,
            EpShape(
                num_ranks=shape.num_ranks,
                slots_per_rank=shape.slots_per_rank,
                hidden_size=shape.hidden,
                step_tokens_max=shape.tokens,
                fp8=fp8,
            ),
            timeout_ms=_TIMEOUT_MS,
            device=torch.device("cuda", torch.cuda.current_device()),
            clock=SystemClock(),
        )
        draw: dict[str, Any] = {
            "generator": torch.Generator("cuda").manual_seed(rank),
            "device": "cuda",
        }
        row_size = self.exchange.row_size
        self.x_TP = torch.randint(-8, 9, (shape.tokens, row_size), **draw).bfloat16()
        order_TS = torch.rand((shape.tokens, shape.slots), **draw).argsort(dim=1)
        self.slots_TK = order_TS[:, : shape.top_k].contiguous()
        self.weights_TK = torch.full((shape.tokens, shape.top_k), 0.125, device="cuda")
        first = rank * shape.slots_per_rank
        self.factor_S = factor(torch.arange(first, first + shape.slots_per_rank, device="cuda"))
        rows = shape.num_ranks * shape.tokens
        self.wide_SMP = torch.zeros(
            (shape.slots_per_rank, rows, row_size), dtype=torch.bfloat16, device="cuda"
        )

    def run(self) -> dict[str, Any]:
        import torch

        self._pair(multiply=True)  # compiles
        torch.cuda.synchronize()
        once, out_TH = self._capture(1, multiply=True)
        many, _ = self._capture(_PAIRS_A_GRAPH, multiply=False)
        self._connect_peers(self._all_gather("handles", self.exchange.handles()))
        self._all_gather("connected", None)
        self.exchange.mask.map_members(self._map()).result()
        self.exchange.mask.adopt(self._map())
        self._all_gather("adopted", None)
        out_TH.fill_(float("nan"))
        once.replay()
        torch.cuda.synchronize()
        self.exchange.mask.check_step(self.exchange.mask_R.cpu().numpy())
        expected_TH = self._expected()
        error = (out_TH.double() - expected_TH.double()).norm() / expected_TH.double().norm()
        return {
            "exact": bool((out_TH == expected_TH).all()),
            "relative_error": float(error),
            "pair_us": self._time(many),
        }

    def _all_gather(self, phase: str, what: object) -> list[Any]:
        """Returns what all ranks have gathered, as soon as all have."""
        self.pipe.send((phase, what))
        gathered: list[Any] = self.pipe.recv()
        return gathered

    def _connect_peers(self, handles: list[ExchangeHandles]) -> None:
        for rank, theirs in enumerate(handles):
            if rank != self.own.rank:
                self.exchange.mask.connect(member(rank), theirs)

    def _map(self) -> ExpertMap:
        shape = self.shape
        return ExpertMap(
            epoch=Epoch(1),
            num_experts=shape.slots,
            members=tuple(member(rank) for rank in range(shape.num_ranks)),
            placement=np.arange(shape.slots, dtype=np.int16).reshape(1, shape.num_ranks, -1),
        )

    def _capture(self, pairs: int, *, multiply: bool) -> tuple[Any, Any]:
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            for _ in range(pairs):
                out_TH = self._pair(multiply=multiply)
        return graph, out_TH

    def _pair(self, *, multiply: bool) -> Any:
        from gpu_worker.cuda.kernels import scaled_rows

        y_SMP, counts_S = self.exchange.dispatch(0, self.x_TP, self.slots_TK)
        if self.exchange.scales is not None:
            wide_NH = self.wide_SMP.flatten(0, 1)
            scaled_rows.dequantise(y_SMP, self.exchange.scales, counts_S, wide_NH)
            y_SMP = self.wide_SMP
        if multiply:
            y_SMP = y_SMP * self.factor_S[:, None, None].bfloat16()
        return self.exchange.combine(0, y_SMP, self.slots_TK, self.weights_TK)

    def _expected(self) -> Any:
        factor_TK = factor(self.slots_TK).double() * self.weights_TK.double()
        return (self.x_TP.double() * factor_TK.sum(dim=1, keepdim=True)).bfloat16()

    def _time(self, graph: Any) -> float:
        import torch

        spent = np.zeros(_REPLAYS)
        for index in range(-5, _REPLAYS):
            began = torch.cuda.Event(enable_timing=True)
            ended = torch.cuda.Event(enable_timing=True)
            began.record(self.stream)
            graph.replay()
            ended.record(self.stream)
            ended.synchronize()
            if index >= 0:
                spent[index] = began.elapsed_time(ended) * 1e3 / _PAIRS_A_GRAPH
        return float(np.median(spent))


def member(rank: int) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(1))


def factor(slot: Any) -> Any:
    import torch

    return torch.pow(2.0, (slot % 3).float())


if __name__ == "__main__":
    main()
