"""What ranks run on, and when they share GPUs."""

from __future__ import annotations

import pytest

from cli.up.device import DevicePlan, num_visible_gpus, plan_device
from shared.errors import ConfigError


@pytest.mark.parametrize(
    ("device", "cuda_mps", "num_ranks", "num_gpus", "expected"),
    [
        ("auto", None, 4, 0, DevicePlan(on_cuda=False, num_gpus=0, mps=False)),
        ("auto", False, 4, 0, DevicePlan(on_cuda=False, num_gpus=0, mps=False)),
        ("auto", None, 2, 2, DevicePlan(on_cuda=True, num_gpus=2, mps=False)),
        ("auto", None, 3, 2, DevicePlan(on_cuda=True, num_gpus=2, mps=True)),
        ("cuda", False, 3, 2, DevicePlan(on_cuda=True, num_gpus=2, mps=False)),
        ("cuda", True, 1, 2, DevicePlan(on_cuda=True, num_gpus=2, mps=True)),
        ("cpu", None, 4, 2, DevicePlan(on_cuda=False, num_gpus=2, mps=False)),
    ],
)
def test_cards_are_shared_where_ranks_outnumber_them_or_where_told(
    device: str, cuda_mps: bool | None, num_ranks: int, num_gpus: int, expected: DevicePlan
) -> None:
    assert plan_device(device, cuda_mps, num_ranks, num_gpus) == expected


@pytest.mark.parametrize(
    ("device", "cuda_mps", "num_gpus", "flag"),
    [("cuda", None, 0, "--device cuda"), ("cpu", True, 2, "--cuda-mps"), ("auto", True, 0, "--cu")],
)
def test_what_needs_a_card_says_so_without_one(
    device: str, cuda_mps: bool | None, num_gpus: int, flag: str
) -> None:
    with pytest.raises(ConfigError, match=flag):
        plan_device(device, cuda_mps, 4, num_gpus)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 4),
        ({"CUDA_VISIBLE_DEVICES": "0,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"}, 4),
    ],
)
def test_only_visible_cards_count(environ: dict[str, str], expected: int) -> None:
    assert num_visible_gpus(4, environ) == expected
