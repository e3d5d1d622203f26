"""The step of the GPU experiment: embedding, then per layer a plain matrix product in the place of
attention, routing, dispatch, experts and combine, then greedy sampling. Not a decoder: an
exchange-and-experts step of DeepSeek-V3.2's shape, whose tokens depend on every expert's weights.

Shape letters: T tokens, H hidden, E experts, K top-k, L layers, S slots of this rank, M received
rows of a slot, I intermediate size of an expert, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as fn

_LOW_RANK = 1024
_VOCAB = 4096
_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    layers: int
    hidden: int
    experts: int
    redundant: int
    top_k: int
    intermediate: int
    tokens: int  # of a rank in a step
    period: int  # steps after which a rank's token sequence starts anew

    @property
    def expert_values(self) -> int:
        return 3 * self.hidden * self.intermediate


class HostWeights:
    """Every expert's weights in memory that all ranks of the host map; what orphans are loaded
    from."""

    def __init__(self, path: Path, shape: StepShape) -> None:
        size = shape.layers * shape.experts * shape.expert_values
        with path.open("ab") as file:
            file.truncate(size * 2)
        flat = torch.from_file(str(path), shared=True, size=size, dtype=torch.int16)
        self._experts = flat.view(shape.layers, shape.experts, shape.expert_values)
        self._stages: list[tuple[Tensor, Any]] = []
        self._next = 0

    def view(self, layer: int, expert: int) -> Tensor:
        return self._experts[layer, expert].view(_DTYPE)

    def open_stages(self) -> None:
        """Makes the pinned buffers that `staged` goes through. The map itself stays unpinned: 32
        processes that pin or even fault in the same gigabytes hold each other up for minutes."""
        for _ in range(2):
            buffer = torch.empty(self._experts.shape[2], dtype=_DTYPE).pin_memory()
            self._stages.append((buffer, torch.cuda.Event()))  # type: ignore[no-untyped-call]

    def staged(self, layer: int, expert: int) -> Tensor:
        """In pinned memory, until the call after the next, which waits for the copy on this stream
        that follows this call."""
        if self._next:  # what was enqueued since the last call reads the last buffer
            self._stages[(self._next - 1) % 2][1].record()
        buffer, copied = self._stages[self._next % 2]
        copied.synchronize()
        self._next += 1
        return buffer.copy_(self.view(layer, expert))


def seeded_expert(shape: StepShape, layer: int, expert: int, device: torch.device) -> Tensor:
    """`[3 H I]` bf16, the same wherever it is made on a card of one kind."""
    generator = torch.Generator(device)
    generator.manual_seed(1 + layer * 100_003 + expert)
    values = torch.randn(shape.expert_values, generator=generator, device=device, dtype=_DTYPE)
    return values.mul_(shape.hidden**-0.5)


class Step:
    """Weights of one rank, its tables, and the captured graphs."""

    def __init__(
        self, shape: StepShape, num_ranks: int, slots: int, rank: int, exchange: Any
    ) -> None:
        self.shape, self.rank, self.exchange = shape, rank, exchange
        self.device = torch.device("cuda", torch.cuda.current_device())
        layers, hidden, inner = shape.layers, shape.hidden, shape.intermediate
        self.up_LSHI = self._empty(layers, slots, hidden, 2 * inner)
        self.down_LSIH = self._empty(layers, slots, inner, hidden)
        generator = torch.Generator(self.device)
        generator.manual_seed(77)  # what is not an expert is the same on every rank

        def dense(*size: int) -> Tensor:
            made = torch.randn(*size, generator=generator, device=self.device, dtype=_DTYPE)
            return made.mul_(size[-2] ** -0.5)

        self.attention = [
            (dense(hidden, _LOW_RANK), dense(_LOW_RANK, hidden)) for _ in range(layers)
        ]
        self.router_LHE = [dense(hidden, shape.experts) for _ in range(layers)]
        self.embedding = dense(_VOCAB, hidden).mul_(hidden**0.5)
        self.positions = dense(shape.period, hidden).mul_(hidden**0.5)
        self.head = dense(hidden, _VOCAB)
        self.slot_of_LE = torch.zeros(layers, shape.experts, dtype=torch.int64, device=self.device)
        self._slot_of_host = torch.zeros(layers, shape.experts, dtype=torch.int64).pin_memory()
        self.input_host = torch.zeros(shape.tokens + 1, dtype=torch.int64).pin_memory()
        self._input = torch.zeros(shape.tokens + 1, dtype=torch.int64, device=self.device)
        self._sampled = torch.zeros(shape.tokens, dtype=torch.int32, device=self.device)
        self._sampled_host = torch.zeros(shape.tokens, dtype=torch.int32).pin_memory()
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}

    def _empty(self, *size: int) -> Tensor:
        return torch.zeros(*size, dtype=_DTYPE, device=self.device)

    def load(self, layer: int, slot: int, values: Tensor) -> None:
        """Puts an expert's weights into a slot."""
        hidden, inner = self.shape.hidden, self.shape.intermediate
        split = 2 * hidden * inner
        self.up_LSHI[layer, slot].copy_(values[:split].view(hidden, 2 * inner), non_blocking=True)
        self.down_LSIH[layer, slot].copy_(values[split:].view(inner, hidden), non_blocking=True)

    def set_table(self, slot_of_LE: NDArray[np.int64]) -> None:
        """In place: graphs see it at their next replay. Nothing may be in flight."""
        self._slot_of_host.copy_(torch.from_numpy(slot_of_LE))
        self.slot_of_LE.copy_(self._slot_of_host, non_blocking=True)
        torch.cuda.current_stream().synchronize()

    def first_tokens(self) -> NDArray[np.int64]:
        return np.random.default_rng(self.rank).integers(0, _VOCAB, self.shape.tokens)

    def run(self, *, elastic: bool) -> None:
        """One step on the current stream. `elastic=False` leaves out what elasticity adds to it:
        the look-up of slots in a table that may change, and the mask."""
        self._input.copy_(self.input_host, non_blocking=True)
        tokens_T, position = self._input[:-1], self._input[-1:]
        x_TH = self.embedding[tokens_T] + self.positions[position]
        for layer in range(self.shape.layers):
            narrow, wide = self.attention[layer]
            x_TH = x_TH + fn.rms_norm(x_TH, (x_TH.shape[1],)) @ narrow @ wide
            x_TH = x_TH + self._experts(layer, fn.rms_norm(x_TH, (x_TH.shape[1],)), elastic)
        logits_TV = fn.rms_norm(x_TH, (x_TH.shape[1],)) @ self.head
        sampled_T = logits_TV.argmax(dim=-1)
        if elastic:
            self.exchange.report(sampled_T)
        else:
            self._sampled.copy_(sampled_T)
            self._sampled_host.copy_(self._sampled, non_blocking=True)

    def _experts(self, layer: int, x_TH: Tensor, elastic: bool) -> Tensor:
        scores_TE = (x_TH @ self.router_LHE[layer]).float()
        weights_TK, experts_TK = scores_TE.topk(self.shape.top_k, dim=-1)
        weights_TK = weights_TK.softmax(dim=-1)
        fixed_TK = experts_TK * 2 + self.rank % 2
        slots_TK = self.slot_of_LE[layer][experts_TK] if elastic else fixed_TK
        x_SMH, _ = self.exchange.dispatch(layer, x_TH, slots_TK)
        gate_SMI, up_SMI = torch.bmm(x_SMH, self.up_LSHI[layer]).chunk(2, dim=-1)
        y_SMH = torch.bmm(fn.silu(gate_SMI) * up_SMI, self.down_LSIH[layer])
        combined_TH: Tensor = self.exchange.combine(layer, y_SMH, slots_TK, weights_TK)
        return combined_TH

    def static_tokens(self) -> NDArray[np.int32]:
        """What the completed step without elasticity sampled."""
        return self._sampled_host.numpy()

    def capture(self) -> None:
        for name in ("elastic", "static"):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.run(elastic=name == "elastic")
            self.graphs[name] = graph
