"""A process writes zeros to another one's memory on the same card, between two of its kernels."""

from __future__ import annotations

import multiprocessing as mp
from multiprocessing.connection import Connection

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def owner(to_parent: Connection) -> None:
    from gpu_worker.cuda.shared_memory import share

    torch.zeros(1000, device="cuda")
    values = torch.ones(8, dtype=torch.int32, device="cuda")
    to_parent.send(share(values))
    to_parent.recv()
    to_parent.send(values.tolist())
    to_parent.recv()


def test_zeros_reach_the_other_process_and_nothing_beside() -> None:
    from gpu_worker.cuda.shared_memory import MappedValues

    context = mp.get_context("spawn")
    to_owner, to_parent = context.Pipe()
    process = context.Process(target=owner, args=(to_parent,))
    process.start()
    place = to_owner.recv()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    mapped = MappedValues(place, 5)
    mapped.zero(stream)
    stream.synchronize()
    to_owner.send(None)
    assert to_owner.recv() == [0] * 5 + [1] * 3
    mapped.close()
    to_owner.send(None)
    process.join(30)
    assert process.exitcode == 0


def test_memory_of_a_process_that_is_gone_is_a_broken_link() -> None:
    from gpu_worker.cuda.shared_memory import MappedValues

    context = mp.get_context("spawn")
    to_owner, to_parent = context.Pipe()
    process = context.Process(target=owner, args=(to_parent,))
    process.start()
    place = to_owner.recv()
    process.kill()
    process.join(30)
    torch.zeros(1, device="cuda")
    with pytest.raises(ConnectionError, match="cuIpcOpenMemHandle"):
        MappedValues(place, 5)
