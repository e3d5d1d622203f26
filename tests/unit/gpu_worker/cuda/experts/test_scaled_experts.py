"""Experts that a checkpoint stores in block-scaled FP8 stay what they are: in slots, in copies on
the host and on the way between them. Runs on the CPU, without kernels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from gpu_worker.checkpoint.checkpoint import SINGLE_FILE
from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.cuda.experts.expert_form import NumberFormat
from gpu_worker.cuda.model_loading import CudaModel, load_cuda_model
from gpu_worker.cuda.weights.scaled_blocks import ScaledBlocks
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from shared.errors import CheckpointError
from shared.expert_cache_memory import ExpertCacheMemory, expert_cache_memory_of_rank
from shared.model_spec import read_model_spec
from tests.support.fake_clock import FakeClock
from tests.support.scaled_values import dequantised

HIDDEN, INNER = 272, 144
"""Three and two blocks, of which the last are partial."""
SIZES = {
    "vocab_size": 304,
    "num_hidden_layers": 2,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": INNER,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
EXPERT = "model.layers.1.mlp.experts.2"
SLOT = (1, 3)
CODES_BYTES, SCALES_BYTES = 3 * HIDDEN * INNER, 4 * 3 * 6
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only."""
    folder = tmp_path_factory.mktemp("checkpoints") / "fp8"
    create_seeded_checkpoint(folder, 5, num_shards=1, dtype=FLOAT8, **SIZES)
    return folder


def changed(folder: Path, other: Path, changes: dict[str, torch.Tensor]) -> Path:
    other.mkdir()
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(load_file(folder / SINGLE_FILE) | changes, other / SINGLE_FILE)
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
    """Expert 2 of the second layer is in SLOT."""
    wanted = model.slots.contents
    wanted[SLOT] = 2
    model.loader.load(wanted)
    assert np.array_equal(model.slots.contents, wanted)
    return model


def assert_slot_holds_what_is_stored(model: CudaModel, folder: Path) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    stored = [[f"{EXPERT}.{n}_proj.weight" for n in names] for names in (("gate", "up"), ("down",))]
    layer, slot = SLOT
    for ours, names in zip(
        (model.slots.gate_up(layer), model.slots.down(layer)), stored, strict=True
    ):
        assert isinstance(ours, ScaledBlocks)
        codes = torch.cat([tensors[name].view(torch.uint8) for name in names])
        assert torch.equal(ours.codes[slot].view(torch.uint8), codes)
        scales = torch.cat([tensors[f"{name}_scale_inv"] for name in names])
        assert torch.equal(ours.scales[slot], scales)


def test_slots_hold_the_codes_and_scales_of_the_checkpoint(folder: Path) -> None:
    model = load(folder)
    assert model.slots.form.num_bytes == CODES_BYTES + SCALES_BYTES
    assert_slot_holds_what_is_stored(with_expert(model), folder)


def test_what_slots_hold_stands_for_the_values_that_the_cpu_ranks_read(folder: Path) -> None:
    from gpu_worker.checkpoint.checkpoint import open_checkpoint

    model, (layer, slot) = with_expert(load(folder)), SLOT
    shapes = {f"{EXPERT}.{n}_proj.weight": (INNER, HIDDEN) for n in ("gate", "up")}
    shapes[f"{EXPERT}.down_proj.weight"] = (HIDDEN, INNER)
    read = [torch.from_numpy(open_checkpoint(folder, shapes).read(name)) for name in shapes]
    gate_up, down = model.slots.gate_up(layer), model.slots.down(layer)
    assert isinstance(gate_up, ScaledBlocks)
    assert isinstance(down, ScaledBlocks)
    ours = [*dequantised(gate_up, matrices=2)[slot].chunk(2), dequantised(down)[slot]]
    for mine, theirs in zip(ours, read, strict=True):
        assert torch.equal(mine.float(), theirs)


def test_copies_on_the_host_are_as_small_as_the_checkpoint(folder: Path) -> None:
    model = with_expert(load(folder, expert_cache_memory_of_rank(-1, 0.1)))
    assert model.host_experts.wait_until_filled(timeout_s=60)
    copy = model.host_experts.cached_values(1, 2)
    assert copy is not None
    assert copy.nbytes == CODES_BYTES + SCALES_BYTES
    wanted = np.full_like(model.slots.contents, -1)
    model.loader.load(wanted)
    with capture_logs() as logs:
        with_expert(model)
    assert [log["from_host"] for log in logs if log["event"] == "experts_loaded"] == [1]
    assert_slot_holds_what_is_stored(model, folder)
    model.host_experts.close()


@pytest.mark.parametrize("byte", [11, CODES_BYTES + SCALES_BYTES - 2])
def test_a_damaged_code_or_scale_is_noticed_and_read_again(folder: Path, byte: int) -> None:
    model = with_expert(load(folder, expert_cache_memory_of_rank(-1, 0.1)))
    assert model.host_experts.wait_until_filled(timeout_s=60)
    copy = model.host_experts.cached_values(1, 2)
    assert copy is not None
    copy[byte] ^= 4
    model.loader.load(np.full_like(model.slots.contents, -1))
    with capture_logs() as logs:
        with_expert(model)
    assert [log["event"] for log in logs].count("expert_copy_damaged") == 1
    assert_slot_holds_what_is_stored(model, folder)
    model.host_experts.close()


def test_scales_in_bfloat16_become_float32(folder: Path, tmp_path: Path) -> None:
    name = f"{EXPERT}.gate_proj.weight_scale_inv"
    scales = load_file(folder / SINGLE_FILE)[name].bfloat16()
    model = with_expert(load(changed(folder, tmp_path / "m", {name: scales})))
    gate_up = model.slots.gate_up(SLOT[0])
    assert isinstance(gate_up, ScaledBlocks)
    assert torch.equal(gate_up.scales[SLOT[1], :2], scales.float())


def test_a_code_that_is_no_number_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    name = f"{EXPERT}.up_proj.weight"
    codes = load_file(folder / SINGLE_FILE)[name].clone()
    codes.view(torch.uint8)[5, 7] = 0x7F
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + ".*NaN"):
        with_expert(load(changed(folder, tmp_path / "m", {name: codes})))


def test_one_matrix_in_bfloat16_widens_all(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    plain = torch.ones(INNER, HIDDEN, dtype=torch.bfloat16)
    model = with_expert(load(changed(folder, tmp_path / "m", {name: plain})))
    assert model.slots.form.number_format is NumberFormat.PLAIN
    assert model.slots.w_gate_up_LSJH.dtype == torch.bfloat16
    assert model.slots.w_gate_up_LSJH[SLOT].any()


def test_blocks_of_another_size_are_widened(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    twice = {  # each block of 128 x 128 as four of 64 x 64
        name: tensor.repeat_interleave(2, 0)
        .repeat_interleave(2, 1)[
            : -(-tensors[name.removesuffix("_scale_inv")].shape[0] // 64),
            : -(-tensors[name.removesuffix("_scale_inv")].shape[1] // 64),
        ]
        .contiguous()
        for name, tensor in tensors.items()
        if name.endswith("_scale_inv")
    }
    other = changed(folder, tmp_path / "m", twice)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    (other / "config.json").write_text(json.dumps(config))
    widened, scaled = with_expert(load(other)), with_expert(load(folder))
    assert widened.slots.form.number_format is NumberFormat.PLAIN
    down = scaled.slots.down(SLOT[0])
    assert isinstance(down, ScaledBlocks)
    exact = dequantised(down)[SLOT[1]]
    assert torch.equal(widened.slots.w_down_LSHI[SLOT], exact.bfloat16())
