"""Compares tiles of the GEMM kernels with each other and with the library, over the layers of a
large model, so that no weight is in the card's cache. Part of `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_worker.checkpoint.gqa_shape import GqaShape
from gpu_worker.cuda.experts.slots import CudaSlots
from gpu_worker.cuda.kernels import attention, experts, linear, routing
from gpu_worker.cuda.kernels.experts import Rows
from gpu_worker.cuda.kernels.paging import Paging
from gpu_worker.cuda.kernels.splits import Partials
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.decoder_weights import DecoderWeights, GqaWeights

REPLAYS = 5


def graph_ms(run: Callable[[], None]) -> float:
    """Milliseconds for all work that `run` enqueues: the median of graph replays."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return replay_ms(graph, REPLAYS)


def replay_ms(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def random_slots(tokens: int, sizes: DecoderSizes, device: torch.device) -> Tensor:
    scores = torch.rand(sizes.num_layers, tokens, sizes.num_experts, device=device)
    return scores.topk(sizes.top_k).indices


class KernelSweep:
    """Rates in TB/s: bytes of the distinct weights that are read, divided by the time."""

    def __init__(self, sizes: DecoderSizes, weights: DecoderWeights, slots: CudaSlots) -> None:
        self.sizes, self.weights, self.slots = sizes, weights, slots
        self.device = weights.device
        assert isinstance(sizes.attention, GqaShape), "attention's sweep is GQA's"
        self.shape = sizes.attention
        layers = [layer.attention for layer in weights.layers]
        self.w_qkv = [own.w_qkv_CH for own in layers if isinstance(own, GqaWeights)]

    def experts(self, tokens: int) -> dict[str, Any]:
        sizes = self.sizes
        slots_LTK = random_slots(tokens, sizes, self.device)
        pairs = tokens * sizes.top_k
        x = torch.randn(tokens, sizes.hidden_size, device=self.device).bfloat16()
        inner = x.new_empty(pairs, sizes.inner_size)
        y = x.new_empty(pairs, sizes.hidden_size)
        rows = [self._rows(slots_TK) for slots_TK in slots_LTK]
        distinct = sum(len(s.unique()) for s in slots_LTK)
        up_bytes = distinct * 2 * sizes.num_expert_weights * 2 // 3
        result: dict[str, Any] = {"distinct_experts_per_layer": distinct / sizes.num_layers}

        def up(tile: experts.ExpertTile) -> None:
            for layer, row in enumerate(rows):
                experts.gate_up(x, self.slots.w_gate_up_LSJH[layer], row, inner, tile=tile)

        def down(tile: experts.ExpertTile) -> None:
            for layer, row in enumerate(rows):
                experts.down(inner, self.slots.w_down_LSHI[layer], row, y, tile=tile)

        result["gate_up"] = self._sweep(up, up_tiles(), up_bytes)
        result["down"] = self._sweep(down, down_tiles(), up_bytes // 2)
        return result

    def grouped_mm(self, tokens: int) -> dict[str, Any]:
        """The library's kernel, on pairs that are already ordered by expert: gate and up only."""
        sizes = self.sizes
        experts_LN = random_slots(tokens, sizes, self.device).flatten(1).sort().values
        every = torch.arange(sizes.num_experts, device=self.device)
        ends = [torch.searchsorted(experts_N, every, right=True).int() for experts_N in experts_LN]
        x = torch.randn(tokens * sizes.top_k, sizes.hidden_size, device=self.device).bfloat16()
        distinct = sum(len(e.unique()) for e in experts_LN)

        def run() -> None:
            for layer, end in enumerate(ends):
                w = self.slots.w_gate_up_LSJH[layer, : sizes.num_experts]
                torch._grouped_mm(x, w.transpose(1, 2), offs=end)

        milliseconds = graph_ms(run)
        nbytes = distinct * 2 * sizes.num_expert_weights * 2 // 3
        return {"ms": milliseconds, "tb_per_s": nbytes / milliseconds / 1e9}

    def dense(self, tokens: int) -> dict[str, Any]:
        """Queries, keys and values: our kernel in parts, and the library's."""
        sizes = self.sizes
        x = torch.randn(tokens, sizes.hidden_size, device=self.device).bfloat16()
        parts = torch.empty(4, tokens, self.w_qkv[0].shape[0], device=self.device)
        whole = x.new_empty(tokens, self.w_qkv[0].shape[0])
        nbytes = sizes.num_layers * self.w_qkv[0].shape[0] * sizes.hidden_size * 2

        def ours(tile: linear.LinearTile) -> None:
            for w_CH in self.w_qkv:
                linear.linear_parts(x, w_CH, parts, tile=tile)

        def library() -> None:
            for w_CH in self.w_qkv:
                assert isinstance(w_CH, Tensor), "the library's product takes no FP8"
                torch.mm(x, w_CH.T, out=whole)

        result = self._sweep(ours, dense_tiles(tokens), nbytes)
        milliseconds = graph_ms(library)
        result["library"] = nbytes / milliseconds / 1e9
        return result

    def attention(self, tokens: int, context: int = 544) -> dict[str, float]:
        """Over one KV cache for each layer, so that none is in the card's cache."""
        sizes, shape, device = self.sizes, self.shape, self.device
        blocks = -(-context // 16)
        cache = (sizes.num_layers, tokens * blocks, shape.num_kv_heads, 16, shape.head_dim)
        k, v = (torch.randn(cache, device=device, dtype=torch.bfloat16) for _ in range(2))
        q = torch.randn(tokens, shape.num_heads, shape.head_dim, device=device).bfloat16()
        rows = torch.arange(tokens, dtype=torch.int32, device=device)
        tables = torch.arange(tokens * blocks, dtype=torch.int32, device=device)
        where = Paging(
            torch.full_like(rows, context - 1), rows, tables.view(tokens, blocks), None, 1
        )
        splits = (tokens, shape.num_heads, -(-context // attention.SPLIT_TOKENS))
        partials = Partials(
            torch.empty(*splits, shape.head_dim, device=device),
            torch.empty(splits, device=device),
            torch.empty(splits, device=device),
        )
        out = q.new_empty(tokens, sizes.heads_size)

        def run(tile: attention.AttentionTile) -> None:
            for layer in range(sizes.num_layers):
                attention.attend(q, k[layer], v[layer], where, partials, out, tile=tile)

        nbytes = sizes.num_layers * tokens * context * shape.kv_size * 4
        return self._sweep(run, attention_tiles(), nbytes)

    def _rows(self, slots_TK: Tensor) -> Rows:
        slots_TK = slots_TK.contiguous()
        if slots_TK.shape[0] <= 4:
            return Rows(slots_TK, None)
        num_slots = self.slots.slots_per_rank
        tiles = routing.new_slot_tiles(slots_TK.numel(), num_slots, 16, self.device)
        routing.group_by_slot(slots_TK, num_slots, tiles)
        return Rows(slots_TK, tiles)

    @staticmethod
    def _sweep(run: Callable[[Any], None], tiles: Iterator[Any], nbytes: int) -> dict[str, float]:
        rates = {}
        for tile in tiles:
            milliseconds = graph_ms(partial(run, tile))
            rates["x".join(map(str, tile))] = nbytes / milliseconds / 1e9
        return dict(sorted(rates.items(), key=lambda item: -item[1]))


def up_tiles() -> Iterator[experts.ExpertTile]:
    for columns, depth, warps, stages in ((32, 128, 4, 3), (32, 256, 4, 4), (64, 256, 8, 3)):
        yield experts.ExpertTile(columns, depth, warps, stages)


def down_tiles() -> Iterator[experts.ExpertTile]:
    for columns, depth, warps, stages in ((64, 128, 4, 3), (64, 256, 4, 3), (32, 256, 4, 4)):
        yield experts.ExpertTile(columns, depth, warps, stages)


def dense_tiles(tokens: int) -> Iterator[linear.LinearTile]:
    """Of decode. With 64 rows on four warps they would be left to warp groups, as those of large
    steps are."""
    if tokens <= 16:
        yield linear.LinearTile(16, 32, 128, 4, 3)
        yield linear.LinearTile(16, 64, 128, 4, 3)
        return
    yield linear.LinearTile(32, 32, 128, 4, 3)
    yield linear.LinearTile(32, 64, 128, 4, 3)
    yield linear.LinearTile(32, 128, 64, 4, 3)
    if tokens > 32:
        yield linear.LinearTile(64, 64, 64, 2, 3)
        yield linear.LinearTile(64, 128, 64, 2, 3)
        yield linear.LinearTile(128, 64, 64, 2, 3)


def attention_tiles() -> Iterator[attention.AttentionTile]:
    for warps, programs in ((1, 2048), (2, 2048), (2, 4096), (4, 2048)):
        yield attention.AttentionTile(warps, 1, programs)
