"""Slots hold what was loaded, say so only once it is complete, and leave other slots alone."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu_worker.cpu.expert_slots import ExpertSlots, MlpSlot
from gpu_worker.cpu.weights import empty_panels
from tests.support.panels import into_panels
from tests.unit.gpu_worker.cpu.runs import Chunk, open_ranks

L, S, H, I = 2, 3, 4, 5  # noqa: E741

Floats = NDArray[np.float32]


def expert(layer: int, number: int) -> tuple[Floats, Floats, Floats]:
    """Gate, up and down."""
    rng = np.random.default_rng((layer, number))
    gate_IH, up_IH = rng.standard_normal((2, I, H), dtype=np.float32)
    return gate_IH, up_IH, rng.standard_normal((H, I), dtype=np.float32)


class Reader:
    """Reads experts by seed, and remembers which."""

    def __init__(self) -> None:
        self.read: list[tuple[int, int]] = []

    def __call__(self, layer: int, number: int, slot: MlpSlot) -> None:
        self.read.append((layer, number))
        gate_IH, up_IH, down_HI = expert(layer, number)
        slot.put_gate(gate_IH)
        slot.put_up(up_IH)
        slot.put_down(down_HI)


def make(reader: object) -> ExpertSlots:
    return ExpertSlots(
        num_layers=L, slots_per_rank=S, hidden_size=H, inner_size=I, read_expert=reader
    )


def placement(*rows: list[int]) -> NDArray[np.int16]:
    return np.array(rows, dtype=np.int16)


def test_all_slots_are_empty_at_first() -> None:
    assert make(Reader()).contents.tolist() == [[-1] * S] * L


def test_a_loaded_slot_holds_the_expert_in_panels() -> None:
    slots = make(Reader())
    slots.load(1, 2, 7)
    (gate_IH, up_IH, down_HI), loaded = expert(1, 7), slots.weights(1)
    gate_up_JH = np.concatenate([gate_IH, up_IH])
    assert np.array_equal(loaded.w_gate_up[2], into_panels(gate_up_JH.T))
    assert np.array_equal(loaded.w_down[2], into_panels(down_HI.T))
    assert slots.contents.tolist() == [[-1, -1, -1], [-1, -1, 7]]


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@pytest.mark.parametrize("inner_size", [1, 7, 16, 31, 32, 33, 48, 100])
def test_gate_and_up_lie_side_by_side_wherever_a_panel_ends(
    inner_size: int, dtype: type[np.generic]
) -> None:
    gate_IH, up_IH = np.arange(2 * inner_size * H, dtype=dtype).reshape(2, inner_size, H) + dtype(1)
    (w_gate_up,) = empty_panels((1,), H, 2 * inner_size, np.dtype(dtype))
    nothing = np.zeros(0, dtype=np.float32)
    slot = MlpSlot(w_gate_up, np.zeros(0, dtype=dtype), nothing, nothing)
    slot.put_up(up_IH)
    slot.put_gate(gate_IH)
    assert np.array_equal(w_gate_up, into_panels(np.concatenate([gate_IH, up_IH]).T))


def test_load_all_reads_only_what_differs_and_reports_each() -> None:
    reader, progress = Reader(), []
    slots = make(reader)
    slots.load_all(placement([0, 1, -1], [2, -1, -1]))
    reader.read.clear()
    desired = placement([0, 3, -1], [-1, -2, 4])
    slots.load_all(desired, lambda done, total: progress.append((done, total)))
    assert reader.read == [(0, 3), (1, 4)]
    assert progress == [(1, 2), (2, 2)]
    assert slots.contents.tolist() == [[0, 3, -1], [-1, -1, 4]]


def test_a_slot_is_empty_while_it_is_loaded_and_after_a_failure() -> None:
    seen: list[int] = []

    def read(layer: int, number: int, slot: MlpSlot) -> None:
        seen.append(int(slots.contents[layer, 0]))
        if number == 9:
            raise OSError("disk")

    slots = make(read)
    slots.load(0, 0, 1)
    with pytest.raises(OSError, match="disk"):
        slots.load(0, 0, 9)
    assert seen == [-1, -1]
    assert slots.contents[0, 0] == -1


def test_contents_are_a_copy() -> None:
    slots = make(Reader())
    slots.contents[:] = 5
    assert (slots.contents == -1).all()


def test_loading_other_slots_meanwhile_changes_no_bit(small_checkpoint: Path) -> None:
    (run,) = open_ranks(small_checkpoint, 1)
    second_replicas = [(0, 8), (1, 3)]  # the exchange uses the first of each expert
    assert run.model.slots.contents[0, 8] == run.model.slots.contents[0, 0]
    assert run.model.slots.contents[1, 3] == run.model.slots.contents[1, 2]
    chunk = Chunk(list(range(20)), 0, (0, 1, 2, 3, 4))
    expected = run.logits(chunk)
    stop = threading.Event()

    def load() -> None:
        number = 0
        while not stop.is_set():
            run.model.slots.load(*second_replicas[number % 2], number % 8)
            number += 1

    loader = threading.Thread(target=load)
    loader.start()
    try:
        for _ in range(20):
            assert np.array_equal(run.logits(chunk), expected)
    finally:
        stop.set()
        loader.join()
