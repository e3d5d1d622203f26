"""Experts that a checkpoint stores in MXFP4 stay so: in slots, in copies on the host and on the way
between them. Runs on the CPU, without kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from gpu_worker.checkpoint.checkpoint import SINGLE_FILE, open_checkpoint
from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.cuda.experts.expert_form import NumberFormat
from gpu_worker.cuda.model_loading import CudaModel, load_cuda_model
from gpu_worker.cuda.weights.mxfp4_matrix import Mxfp4Matrix
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from shared.errors import CheckpointError
from shared.expert_bytes import expert_bytes
from shared.expert_cache_memory import ExpertCacheMemory, expert_cache_memory_of_rank
from shared.model_spec import read_model_spec
from tests.support.fake_clock import FakeClock
from tests.support.mxfp4_values import widened, widened_gate_up

HIDDEN, INNER, EXPERTS = 160, 96, 4
"""Five and three groups, of which the last four and the last one are no whole word of scales."""
SIZES = {
    "vocab_size": 304,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_local_experts": EXPERTS,
    "head_dim": 16,
}
PREFIX = "model.layers.1.mlp.experts"
EXPERT = 2
LAYER, SLOT = PLACE = (1, 3)
CODES_BYTES = 3 * HIDDEN * INNER // 2
SCALES_BYTES = 4 * (2 * 2 * INNER + 1 * HIDDEN)
BIAS_BYTES = 2 * (2 * INNER + HIDDEN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only."""
    folder = tmp_path_factory.mktemp("checkpoints") / "mxfp4"
    create_seeded_checkpoint(
        folder, 5, family="gpt_oss", num_shards=1, dtype=torch.float4_e2m1fn_x2, **SIZES
    )
    return folder


def changed(
    folder: Path, other: Path, changes: dict[str, torch.Tensor], without: tuple[str, ...] = ()
) -> Path:
    other.mkdir()
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / SINGLE_FILE) | changes
    save_file({k: v for k, v in tensors.items() if k not in without}, other / SINGLE_FILE)
    return other


def load(folder: Path, memory: ExpertCacheMemory | None = None) -> CudaModel:
    return load_cuda_model(
        folder,
        read_model_spec(folder),
        slots_per_rank=5,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        progress=LoadProgress(FakeClock()),
        cache_memory=memory,
    )


def with_expert(model: CudaModel) -> CudaModel:
    """The expert is in its place."""
    wanted = model.slots.contents
    wanted[PLACE] = EXPERT
    model.loader.load(wanted)
    assert np.array_equal(model.slots.contents, wanted)
    return model


def assert_slot_holds_what_cpu_ranks_read(model: CudaModel, folder: Path) -> None:
    shapes = {
        f"{PREFIX}.gate_up_proj": (EXPERTS, HIDDEN, 2 * INNER),
        f"{PREFIX}.down_proj": (EXPERTS, INNER, HIDDEN),
        f"{PREFIX}.gate_up_proj_bias": (EXPERTS, 2 * INNER),
    }
    checkpoint = open_checkpoint(folder, shapes)
    gate_up, down, bias = (
        torch.from_numpy(checkpoint.read_part(name, EXPERT)).double() for name in shapes
    )
    ours, ours_down = model.slots.gate_up(LAYER), model.slots.down(LAYER)
    assert isinstance(ours, Mxfp4Matrix)
    assert isinstance(ours_down, Mxfp4Matrix)
    gate, up = widened_gate_up(ours)[SLOT].chunk(2)
    assert torch.equal(gate, gate_up[:, ::2].T)
    assert torch.equal(up, gate_up[:, 1::2].T)
    assert gate.std() > 0
    assert torch.equal(widened(ours_down)[SLOT], down.T)
    assert model.slots.b_gate_up_LSJ is not None
    b_gate, b_up = model.slots.b_gate_up_LSJ[PLACE].double().chunk(2)
    assert torch.equal(b_gate, bias[::2])
    assert torch.equal(b_up, bias[1::2])


def test_slots_hold_the_codes_and_scales_of_the_checkpoint(folder: Path) -> None:
    model = load(folder)
    assert model.slots.form.number_format is NumberFormat.MXFP4
    assert model.slots.form.num_bytes == CODES_BYTES + SCALES_BYTES + BIAS_BYTES
    assert_slot_holds_what_cpu_ranks_read(with_expert(model), folder)


def test_a_plan_counts_the_bytes_that_slots_take_without_biases(folder: Path) -> None:
    assert expert_bytes(read_model_spec(folder)) == CODES_BYTES + SCALES_BYTES


def test_copies_on_the_host_are_as_small_as_slots(folder: Path) -> None:
    model = with_expert(load(folder, expert_cache_memory_of_rank(-1, 0.1)))
    assert model.host_experts.wait_until_filled(timeout_s=60)
    copy = model.host_experts.cached_values(LAYER, EXPERT)
    assert copy is not None
    assert copy.nbytes == model.slots.form.num_bytes
    model.loader.load(np.full_like(model.slots.contents, -1))
    with capture_logs() as logs:
        with_expert(model)
    assert [log["from_host"] for log in logs if log["event"] == "experts_loaded"] == [1]
    assert_slot_holds_what_cpu_ranks_read(model, folder)
    model.host_experts.close()


@pytest.mark.parametrize("byte", [11, CODES_BYTES + 5, CODES_BYTES + SCALES_BYTES + 3])
def test_a_damaged_code_scale_or_bias_is_noticed_and_read_again(folder: Path, byte: int) -> None:
    model = with_expert(load(folder, expert_cache_memory_of_rank(-1, 0.1)))
    assert model.host_experts.wait_until_filled(timeout_s=60)
    copy = model.host_experts.cached_values(LAYER, EXPERT)
    assert copy is not None
    copy[byte] ^= 4
    model.loader.load(np.full_like(model.slots.contents, -1))
    with capture_logs() as logs:
        with_expert(model)
    assert [log["event"] for log in logs].count("expert_copy_damaged") == 1
    assert_slot_holds_what_cpu_ranks_read(model, folder)
    model.host_experts.close()


def test_a_scale_that_is_no_number_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    name = f"{PREFIX}.down_proj_scales"
    scales = load_file(folder / SINGLE_FILE)[name].clone()
    scales[EXPERT, 5, 1] = 0xFF
    other = changed(folder, tmp_path / "m", {name: scales})
    with pytest.raises(CheckpointError, match=r"down_proj.*NaN"):
        with_expert(load(other))


def test_one_matrix_in_bfloat16_widens_all(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    plain = torch.ones(EXPERTS, INNER, HIDDEN, dtype=torch.bfloat16)
    coded = (f"{name}_blocks", f"{name}_scales")
    model = with_expert(load(changed(folder, tmp_path / "m", {name: plain}, coded)))
    assert model.slots.form.number_format is NumberFormat.PLAIN
    native = with_expert(load(folder))
    gate_up, down = native.slots.gate_up(LAYER), native.slots.down(LAYER)
    assert isinstance(gate_up, Mxfp4Matrix)
    assert isinstance(down, Mxfp4Matrix)
    exact = widened_gate_up(gate_up)[SLOT], widened(down)[SLOT]
    assert torch.equal(model.slots.w_gate_up_LSJH[PLACE].double(), exact[0])
    assert torch.equal(model.slots.w_down_LSHI[PLACE].double(), exact[1])
