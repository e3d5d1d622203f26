"""Every family that CUDA ranks serve, from a checkpoint of its own, against transformers and
against its CPU twin: for a whole prefill, for chunks and for decode through scattered blocks. A
token has the same bits in all of them and beside others. Runs on a CUDA device in bf16, with
graphs; elsewhere on Triton's interpreter in float32."""

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

ON_CUDA = torch.cuda.is_available()
if not ON_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from gpu_worker.checkpoint.load_progress import LoadProgress  # noqa: E402
from gpu_worker.cuda.decoder import Decoder, DecoderOptions  # noqa: E402
from gpu_worker.cuda.model_loading import load_cuda_model  # noqa: E402
from gpu_worker.cuda.stages.moe_stage import ExchangedMoe, LocalMoe, MoeStage  # noqa: E402
from gpu_worker.cuda.weights.checkpoint_layouts import CHECKPOINT_LAYOUTS  # noqa: E402
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint  # noqa: E402
from gpu_worker.model_tools.seeded_configs import SEEDED_CONFIGS  # noqa: E402
from shared.clock import SystemClock  # noqa: E402
from shared.model_spec import read_model_spec  # noqa: E402
from tests.support.cuda_steps import LoopbackExchange  # noqa: E402
from tests.unit.gpu_worker.cpu.reference import quantise_mxfp4, reference_logits  # noqa: E402
from tests.unit.gpu_worker.cpu.runs import Chunk, make_batch, open_ranks  # noqa: E402

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
TOLERANCE = 5e-2 if ON_CUDA else 1e-4
LENGTH, BLOCK_TOKENS, VOCAB = 40, 16, 304
TABLE, OTHER_TABLE = (4, 1, 6), (7, 2, 0)
"""Block tables in no order."""

WHOLE = (0, LENGTH)
CHUNKS_AND_DECODE = (0, 17, 36, 37, 38, 39, LENGTH)
ENDS = np.array(CHUNKS_AND_DECODE[1:]) - 1
GQA = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "glm4_moe": GQA
    | {"head_dim": 32, "moe_intermediate_size": 32, "intermediate_size": 48, "n_shared_experts": 2},
    "gpt_oss": GQA | {"num_attention_heads": 8, "intermediate_size": 32},
    "mixtral": GQA | {"intermediate_size": 32},
    "olmoe": GQA | {"intermediate_size": 32},
    "qwen3": GQA | {"intermediate_size": 48},
}
"""Sizes that the kernels' tiles divide, by family. The families with latent attention have tests of
their own, as Qwen3-MoE has."""

TESTED_ELSEWHERE = {"deepseek_v2", "deepseek_v3", "deepseek_v32", "qwen3_moe"}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / request.param
    changes = CHECKPOINTS[request.param]
    create_seeded_checkpoint(folder, 5, family=request.param, dtype=DTYPE, num_shards=1, **changes)
    return folder


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return decoder_of(folder)


def decoder_of(folder: Path, *, exchanges: bool = False) -> Decoder:
    """`exchanges`: what one rank computes, it gets through an exchange that pads rows by slot."""
    spec = read_model_spec(folder)
    model = load_cuda_model(
        folder,
        spec,
        slots_per_rank=spec.num_experts,
        device=DEVICE,
        dtype=DTYPE,
        progress=LoadProgress(SystemClock()),
    )
    order = np.random.default_rng(2).permutation(spec.num_experts)
    held = model.loader.load(np.tile(order.astype(np.int16), (spec.num_moe_layers, 1)))
    options = DecoderOptions(
        kv_blocks=8,
        block_tokens=BLOCK_TOKENS,
        context_tokens_max=len(TABLE) * BLOCK_TOKENS,
        decode_batch_sizes=(1, 8),
        prefill_tokens=2 * LENGTH,
        prefill_sequences=2,
    )
    clamped, tokens = model.sizes.clamped_experts, options.prefill_tokens
    moe: MoeStage = LocalMoe(
        model.slots, top_k=model.sizes.top_k, step_tokens_max=tokens, clamped=clamped
    )
    if exchanges:
        exchange = LoopbackExchange(model.slots.slots_per_rank, tokens, spec.hidden_size + 32)
        moe = ExchangedMoe(model.slots, exchange, rows_of_slot=tokens, clamped=clamped)
    decoder = Decoder(model.sizes, model.weights, moe, options)
    decoder.use_slots(np.argsort(held, axis=1).astype(np.int32)[:, None])
    if ON_CUDA:
        decoder.capture()
    return decoder


def tokens_of(seed: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, VOCAB, LENGTH).astype(np.int32)


def logits_of(
    decoder: Decoder, cuts: tuple[int, ...], *, neighbour: NDArray[np.int32] | None = None
) -> torch.Tensor:
    """Of the last row of each chunk between two cuts, `[C, V]`. The neighbour goes the same way."""
    rows, tokens = [], tokens_of(1)
    for start, end in itertools.pairwise(cuts):
        chunks = [Chunk(tokens[start:end], start, TABLE)]
        if neighbour is not None:
            chunks.insert(0, Chunk(neighbour[start:end], start, OTHER_TABLE))
        pending = decoder.launch(make_batch(chunks, all_rows=False))
        pending.ids()
        rows.append(pending.logits_RV[-1].float().cpu().clone())
    return torch.stack(rows)


def distance(ours: torch.Tensor, theirs: NDArray[np.float32]) -> float:
    exact = torch.from_numpy(theirs)
    return float((ours - exact).norm() / exact.norm())


def test_logits_are_those_of_transformers(folder: Path, decoder: Decoder) -> None:
    theirs = reference_logits(folder, tokens_of(1))
    assert theirs.std() > 1, "logits without spread would agree with anything"
    assert distance(logits_of(decoder, CHUNKS_AND_DECODE), theirs[ENDS]) < TOLERANCE
    assert distance(logits_of(decoder, WHOLE), theirs[-1:]) < TOLERANCE


def test_logits_are_those_of_the_cpu_twin(folder: Path, decoder: Decoder) -> None:
    (run,) = open_ranks(folder, 1, block_tokens=BLOCK_TOKENS)
    twin = run.logits(Chunk(tokens_of(1), 0, TABLE))
    assert distance(logits_of(decoder, CHUNKS_AND_DECODE), twin[ENDS]) < TOLERANCE


def test_biased_experts_compute_alike_around_an_exchange(folder: Path, decoder: Decoder) -> None:
    if folder.name != "gpt_oss":
        pytest.skip("its experts have no biases: tests/gpu/test_decoder.py")
    logits = logits_of(decoder_of(folder, exchanges=True), (0, 36, 37))
    local = logits_of(decoder, (0, 36, 37))
    assert distance(logits, local.numpy()) < TOLERANCE


def test_a_token_has_the_same_bits_in_any_chunks_and_beside_others(decoder: Decoder) -> None:
    alone = logits_of(decoder, CHUNKS_AND_DECODE)
    ways = {
        "again": logits_of(decoder, CHUNKS_AND_DECODE),
        "beside another": logits_of(decoder, CHUNKS_AND_DECODE, neighbour=tokens_of(9)),
    }
    for way, logits in ways.items():
        assert_same(logits, alone, way)
    assert_same(logits_of(decoder, WHOLE), alone[-1:], "whole")
    assert_same(logits_of(decoder, (0, 5, LENGTH))[-1:], alone[-1:], "in other chunks")


def assert_same(logits: torch.Tensor, expected: torch.Tensor, way: str) -> None:
    """The interpreter multiplies with numpy, whose rounding depends on the shape."""
    if ON_CUDA:
        assert torch.equal(logits, expected), way
    else:
        assert distance(logits, expected.numpy()) < TOLERANCE, way


def test_experts_in_mxfp4_give_the_bits_of_their_widened_weights(tmp_path: Path) -> None:
    """Of one chunk, and of decode."""
    plain = tmp_path / "plain"
    sizes = CHECKPOINTS["gpt_oss"] | {"num_hidden_layers": 2}
    create_seeded_checkpoint(
        plain, 5, family="gpt_oss", dtype=torch.bfloat16, num_shards=1, **sizes
    )
    coded = quantise_mxfp4(plain, tmp_path / "coded")
    native, widened = decoder_of(coded), decoder_of(plain)
    cuts = (0, LENGTH - 1, LENGTH)
    logits = logits_of(native, cuts)
    assert_same(logits, logits_of(widened, cuts), "widened")
    assert logits.std() > 1, "logits without spread would agree with anything"


def test_every_family_is_covered_here_or_in_a_file_of_its_own() -> None:
    served = {
        family
        for family, config in SEEDED_CONFIGS.items()
        if config["architectures"][0] in CHECKPOINT_LAYOUTS
    }
    assert served == set(CHECKPOINTS) | TESTED_ELSEWHERE
