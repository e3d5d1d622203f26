"""Dispatch and combine alone, bf16 and fp8: that bf16 is exact, how close fp8 is, and what a pair
of them costs under a CUDA graph."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpu_ep_rank import Rank, RankArguments, run_rank
from gpu_worker.cuda.ep_exchange import FP8_BLOCK, EpExchange
from gpu_worker.cuda.ep_rendezvous import Peer
from shared.expert_map import ExpertMap
from shared.types import Step as StepIndex

_PAIRS_A_GRAPH = 20
_REPLAYS = 40


def main(arguments: RankArguments, pipe: Connection) -> None:
    run_rank(_Prober(arguments, pipe))


class _Prober(Rank):
    """Slots multiply by a power of two of their own, and weights are eighths: every product and sum
    is exact in bf16's range, so that results must be equal, not close."""

    def _engine(self) -> None:
        torch.cuda.set_device(self.device)
        a = self.arguments
        shape, slots = a.shape, a.num_ranks * a.slots
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.tell("made", None)
        self.first_contents.get(timeout=240)
        generator = torch.Generator(self.device)
        generator.manual_seed(a.rank)
        draw: dict[str, Any] = {"generator": generator, "device": self.device}
        self.x_TH = torch.randint(-8, 9, (shape.tokens, shape.hidden), **draw).bfloat16()
        order_TS = torch.rand((shape.tokens, slots), **draw).argsort(dim=1)
        self.slots_TK = order_TS[:, : shape.top_k].contiguous()
        self.weights_TK = torch.full((shape.tokens, shape.top_k), 0.125, device=self.device)
        own_S = torch.arange(a.rank * a.slots, (a.rank + 1) * a.slots, device=self.device)
        self.factor_S = _factor(own_S).bfloat16()
        with torch.cuda.stream(self.stream):
            graphs = self._capture(self.exchange)
            self.tell("ready", {})
            wanted = self.maps.get(timeout=240)
            bf16 = self._measure(self.exchange, graphs, wanted)
            graphs.clear()
            again = self.open_exchange(fp8=True)
            graphs = self._capture(again)
            others = [m for m in wanted.members if m != self.own]
            self.rendezvous.expect({m.rank: Peer(m, 1) for m in others})
            again.connect({m.rank: m.incarnation for m in others})
            fp8 = self._measure(again, graphs, wanted)
        self.tell("stopped", {"bf16": bf16, "fp8": fp8})

    def _capture(self, exchange: EpExchange) -> list[Any]:
        """One pair with experts that multiply, and many pairs without."""
        shape, a = self.arguments.shape, self.arguments
        rows = a.num_ranks * shape.tokens
        self.plain_SMH = torch.zeros(
            (a.slots, rows, shape.hidden), dtype=torch.bfloat16, device=self.device
        )
        with exchange.warm_up():
            self._pair(exchange, multiply=True)
            torch.cuda.synchronize()
        graphs = []
        for pairs in (1, _PAIRS_A_GRAPH):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                for _ in range(pairs):
                    out_TH = self._pair(exchange, multiply=pairs == 1)
                exchange.report(self.slots_TK[:, 0])
            graphs.append(graph)
            if pairs == 1:
                self.out_TH = out_TH
        return graphs

    def _measure(
        self, exchange: EpExchange, graphs: list[Any], expert_map: ExpertMap
    ) -> dict[str, Any]:
        exchange.adopt(expert_map)
        self.tell("entered", expert_map.epoch)
        self.go.get(timeout=240)
        exchange.begin_step(expert_map.epoch, StepIndex(0))
        self.out_TH.fill_(float("nan"))
        graphs[0].replay()
        torch.cuda.synchronize()
        exchange.tokens_after_step(1)
        expected_TH = self._expected()
        error = (self.out_TH.double() - expected_TH.double()).norm() / expected_TH.double().norm()
        return {
            "exact": bool((self.out_TH == expected_TH).all()),
            "relative_error": float(error),
            "pair_us": self._time(exchange, graphs[1]),
        }

    def _pair(self, exchange: EpExchange, *, multiply: bool) -> Tensor:
        y_SMH, _ = exchange.dispatch(0, self.x_TH, self.slots_TK)
        if multiply:
            if exchange.scales is not None:
                scales = exchange.scales.repeat_interleave(FP8_BLOCK, dim=2)
                y_SMH = (y_SMH.float() * scales).bfloat16()
            y_SMH = y_SMH * self.factor_S[:, None, None]
        elif y_SMH.dtype != torch.bfloat16:
            y_SMH = self.plain_SMH
        return exchange.combine(0, y_SMH, self.slots_TK, self.weights_TK)

    def _expected(self) -> Tensor:
        factor_TK = _factor(self.slots_TK).double() * self.weights_TK.double()
        return (self.x_TH.double() * factor_TK.sum(dim=1, keepdim=True)).bfloat16()

    def _time(self, exchange: EpExchange, graph: Any) -> float:
        spent = np.zeros(_REPLAYS)
        for index in range(-5, _REPLAYS):
            began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            began.record(self.stream)
            graph.replay()
            ended.record(self.stream)
            ended.synchronize()
            exchange.tokens_after_step(1)
            if index >= 0:
                spent[index] = began.elapsed_time(ended) * 1e3 / _PAIRS_A_GRAPH
        return float(np.median(spent))


def _factor(slot: Tensor) -> Tensor:
    return torch.pow(2.0, (slot % 3).float())
