"""Loads a checkpoint on a CUDA rank, with experts in slots in no order. The decoder's logits are
those of the CPU model on the same folder. Runs on a CUDA device in bf16; elsewhere on Triton's
interpreter in float32."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("triton", reason="Triton is not installed: there is no CUDA device here")
pytest.importorskip("numba", reason="the CPU model is what logits are compared with")

ON_CUDA = torch.cuda.is_available()
if not ON_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from gpu_worker.checkpoint.load_progress import LoadProgress  # noqa: E402
from gpu_worker.cuda.decoder import Decoder, DecoderOptions  # noqa: E402
from gpu_worker.cuda.model_loading import CudaModel, load_cuda_model  # noqa: E402
from gpu_worker.cuda.stages.moe_stage import LocalMoe  # noqa: E402
from gpu_worker.cuda.weights.pinned_memory import PinnedBlock, pin  # noqa: E402
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint  # noqa: E402
from shared.clock import SystemClock  # noqa: E402
from shared.expert_cache_memory import ExpertCacheMemory, expert_cache_memory_of_rank  # noqa: E402
from shared.model_spec import read_model_spec  # noqa: E402
from tests.unit.gpu_worker.cpu.runs import Chunk, make_batch, open_ranks  # noqa: E402

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
TOLERANCE = 5e-2 if ON_CUDA else 1e-4
BLOCK_TOKENS = 16
TABLE = (4, 1, 6)
"""A block table in no order."""

SPARE = 3
COMMON = {
    "vocab_size": 304,
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
DEEPSEEK = COMMON | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": COMMON | {"num_key_value_heads": 2, "head_dim": 32, "num_experts": 8},
    "deepseek_v2": DEEPSEEK | {"q_lora_rank": None},
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": DEEPSEEK | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 64},
}
FORMS = {"": torch.float32, "-fp8": torch.float8_e4m3fn}
FOLDERS = [*CHECKPOINTS, "qwen3_moe-fp8", "deepseek_v3-fp8"]


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / request.param
    family, mark, form = request.param.partition("-")
    changes = CHECKPOINTS[family]
    create_seeded_checkpoint(folder, 3, family=family, dtype=FORMS[mark + form], **changes)
    return folder


def assert_same_bits(one: CudaModel, other: CudaModel) -> None:
    for mine, theirs in zip(one.slots.parts, other.slots.parts, strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


def load(folder: Path, cache_memory: ExpertCacheMemory | None = None) -> CudaModel:
    spec = read_model_spec(folder)
    return load_cuda_model(
        folder,
        spec,
        slots_per_rank=spec.num_experts + SPARE,
        device=DEVICE,
        dtype=DTYPE,
        progress=LoadProgress(SystemClock()),
        cache_memory=cache_memory,
    )


def spread(num_layers: int, num_experts: int) -> NDArray[np.int16]:
    """`[L, S]`: every expert is in a slot, some in two, in another order in each layer."""
    rng = np.random.default_rng(8)
    held = [
        np.append(np.arange(num_experts), rng.integers(0, num_experts, SPARE))
        for _ in range(num_layers)
    ]
    return np.stack([rng.permutation(layer) for layer in held]).astype(np.int16)


def table_of(contents_LS: NDArray[np.int16], num_experts: int) -> NDArray[np.int32]:
    """`[L, 1, E]`: the last slot that holds each expert."""
    slot_of_LUE = np.full((contents_LS.shape[0], 1, num_experts), -1, dtype=np.int32)
    for layer, slot in np.argwhere(contents_LS >= 0):
        slot_of_LUE[layer, 0, contents_LS[layer, slot]] = slot
    return slot_of_LUE


def decoder_of(model: CudaModel, contents_LS: NDArray[np.int16]) -> Decoder:
    options = DecoderOptions(
        kv_blocks=8,
        block_tokens=BLOCK_TOKENS,
        context_tokens_max=len(TABLE) * BLOCK_TOKENS,
        decode_batch_sizes=(1,),
        prefill_tokens=32,
        prefill_sequences=1,
    )
    moe = LocalMoe(model.slots, top_k=model.sizes.top_k, step_tokens_max=32)
    decoder = Decoder(model.sizes, model.weights, moe, options)
    decoder.use_slots(table_of(contents_LS, model.sizes.num_experts))
    return decoder


def logits_of(decoder: Decoder, tokens: NDArray[np.int32], cuts: list[int]) -> NDArray[np.float32]:
    """The logits of the last row of each chunk between two cuts."""
    rows = []
    for start, end in itertools.pairwise(cuts):
        batch = make_batch([Chunk(tokens[start:end], start, TABLE)], all_rows=False)
        pending = decoder.launch(batch)
        pending.ids()
        rows.append(pending.logits_RV[0].float().cpu().numpy().copy())
    return np.stack(rows)


def test_logits_are_those_of_the_cpu_model(folder: Path) -> None:
    model = load(folder)
    wanted = spread(model.slots.num_layers, model.sizes.num_experts)
    held = model.loader.load(wanted)
    tokens = np.random.default_rng(1).integers(0, model.sizes.vocab_size, 40).astype(np.int32)
    cuts = [0, 25, 36, 37, 38, 39, 40]
    ours = logits_of(decoder_of(model, held), tokens, cuts)
    (run,) = open_ranks(folder, 1, block_tokens=BLOCK_TOKENS)
    exact = run.logits(Chunk(tokens, 0, TABLE))[np.array(cuts[1:]) - 1]
    assert exact.std() > 1, "logits without spread would agree with anything"
    assert np.linalg.norm(ours - exact) < TOLERANCE * np.linalg.norm(exact)


def test_from_pinned_copies_slots_get_what_the_checkpoint_gives(folder: Path) -> None:
    memory = expert_cache_memory_of_rank(-1, 0.1)
    plain, model = load(folder), load(folder, memory)
    wanted = spread(model.slots.num_layers, model.sizes.num_experts)
    model.loader.load(wanted)
    assert model.host_experts.wait_until_filled(timeout_s=60)
    copy = model.host_experts.cached_values(1, 5)
    assert copy is not None
    assert copy.is_pinned() == ON_CUDA
    for other in (wanted[:, ::-1], np.roll(wanted, 1, axis=0)):
        assert np.array_equal(model.loader.load(other), plain.loader.load(other))
        assert_same_bits(model, plain)
    beside = load(folder, memory)  # as another rank of this host
    model.host_experts.close()
    assert model.host_experts.cached_values(1, 5) is None
    assert np.array_equal(beside.loader.load(wanted), plain.loader.load(wanted))
    assert_same_bits(beside, plain)
    copy = beside.host_experts.cached_values(1, 5)
    assert copy is not None
    assert copy.is_pinned() == ON_CUDA
    beside.host_experts.close()


@pytest.mark.skipif(not ON_CUDA, reason="nothing is pinned without a CUDA device")
def test_a_refusal_to_pin_is_told_and_no_later_launch_meets_it() -> None:
    block = PinnedBlock(2**20, DEVICE)
    with pytest.raises(OSError, match="CUDA error"):
        pin(block.bytes_B, DEVICE)
    assert torch.ones(3, device=DEVICE).sum().item() == 3
    block.unpin()
