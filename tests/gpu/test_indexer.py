"""Compares the indexer's kernels with plain torch in float64 and with the CPU model's selection,
and a decoder whose context is longer than what its indexer selects with the CPU model on the same
folder. Runs on a CUDA device in bf16; elsewhere on Triton's interpreter in float32."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.cuda_values import DEVICE, DTYPE, ON_CUDA, Closeness, ints, poison, random

pytest.importorskip("triton", reason="Triton is not installed: there is no CUDA device here")
pytest.importorskip("numba", reason="the CPU model is what choices and logits are compared with")

if not ON_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.checkpoint.mla_shape import MlaShape
from gpu_worker.cpu.kernels.mla import _choose_positions
from gpu_worker.cuda.decoder import Decoder, DecoderOptions
from gpu_worker.cuda.kernels import indexer, latent
from gpu_worker.cuda.kernels.paging import Paging
from gpu_worker.cuda.kernels.splits import Partials
from gpu_worker.cuda.model_loading import CudaModel, load_cuda_model
from gpu_worker.cuda.stages.moe_stage import LocalMoe
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from shared.clock import SystemClock
from shared.model_spec import read_model_spec
from tests.support.cuda_steps import BLOCKS_EACH, continue_alone, step
from tests.unit.gpu_worker.cpu.runs import Chunk, open_ranks

pytestmark = pytest.mark.gpu

_CLOSENESS = Closeness(1e-2 if ON_CUDA else 2e-6)
assert_close, assert_same = _CLOSENESS.assert_close, _CLOSENESS.assert_same
HEADS, SIZE, ROTATED = 5, 64, 16
TOP_K = 40
BLOCK_TOKENS, BLOCKS = 16, 12
EPS = 1e-6


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def paging(positions: list[int], sequences: list[int], blocks: int = BLOCKS) -> Paging:
    tables = torch.randperm(3 * blocks, device=DEVICE).view(3, blocks).to(torch.int32)
    return Paging(ints(positions), ints(sequences), tables, None, 1)


def rotation(positions: int) -> tuple[latent.Rotation, torch.Tensor]:
    angles = torch.rand(positions, ROTATED // 2, device=DEVICE) * 6
    return latent.Rotation(angles.cos(), angles.sin(), True), angles.double()


def rotated_by(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    low, high = x[..., :ROTATED].chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    halves = [low * cos - high * sin, high * cos + low * sin]
    return torch.cat([*halves, x[..., ROTATED:]], dim=-1)


def test_keys_are_normed_rotated_and_stored_and_weights_scaled() -> None:
    where = paging([40, 3, -1], [1, 0, 2])
    parts = random(4, 3, SIZE + HEADS, dtype=torch.float32) + 1.0
    norm, bias = random(SIZE, dtype=torch.float32), random(SIZE, dtype=torch.float32)
    rotations, angles = rotation(64)
    keys = random(3 * BLOCKS, BLOCK_TOKENS, SIZE)
    before, weights = keys.clone(), poison(3, HEADS, dtype=torch.float32)
    indexer.norm_and_store_keys(parts, norm, bias, rotations, where, keys, weights, eps=EPS)
    whole = parts.double().sum(0)
    assert_close(weights[:2], whole[:2, SIZE:] * (HEADS * SIZE) ** -0.5, 1e-6)
    for row in (0, 1):
        position = int(where.position_T[row])
        block = int(where.tables_SB[int(where.sequence_T[row]), position // BLOCK_TOKENS])
        normed = torch.nn.functional.layer_norm(
            whole[row, :SIZE], (SIZE,), norm.double(), bias.double(), EPS
        )
        assert_close(keys[block, position % BLOCK_TOKENS], rotated_by(normed, angles[position]))
    assert int((keys != before).any(-1).sum()) == 2, "a row without a token stores none"


def test_queries_of_rows_that_choose_are_rotated() -> None:
    position = ints([TOP_K - 1, TOP_K, -1, TOP_K + 9])
    q = random(2, 4, HEADS * SIZE, dtype=torch.float32)
    rotations, angles = rotation(64)
    out = poison(4, HEADS, SIZE)
    indexer.rotate_index_queries(q, rotations, position, out, top_k=TOP_K)
    heads = q.double().sum(0).view(4, HEADS, SIZE)
    for row in (1, 3):
        assert_close(out[row], rotated_by(heads[row], angles[int(position[row])]))
    assert out[[0, 2]].isnan().all(), "the others have no use for them"


def scores_of(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, where: Paging, programs: int = 1024
) -> torch.Tensor:
    context = where.tables_SB.shape[1] * BLOCK_TOKENS
    scores = poison(q.shape[0], context, dtype=torch.float32)
    tile = indexer.SCORE_TILE._replace(programs=programs)
    indexer.score_positions(q, weights, keys, where, scores, top_k=TOP_K, tile=tile)
    return scores


def test_scores_follow_their_formula_up_to_a_rows_own_position() -> None:
    positions = [TOP_K, 150, TOP_K - 1, -1, 64, 63]
    where = paging(positions, [0, 1, 2, 0, 2, 2])
    keys = poison(3 * BLOCKS, BLOCK_TOKENS, SIZE)
    for sequence, length in enumerate((TOP_K + 1, 151, 65)):
        at = torch.arange(length, device=DEVICE)
        blocks = where.tables_SB[sequence].long()[at // BLOCK_TOKENS]
        keys[blocks, at % BLOCK_TOKENS] = random(length, SIZE)
    q, weights = random(6, HEADS, SIZE), random(6, HEADS, dtype=torch.float32)
    scores = scores_of(q, weights, keys, where)
    for row, position in enumerate(positions):
        if position < TOP_K:
            assert scores[row].isnan().all(), "it has nothing to choose"
            continue
        blocks = where.tables_SB[int(where.sequence_T[row])].long()
        own = keys[blocks].reshape(-1, SIZE)[: position + 1].double()
        products = (q[row].double() @ own.T).relu()
        assert_close(scores[row, : position + 1], weights[row].double() @ products)
        assert scores[row, position + 1 :].isnan().all()


def test_a_rows_scores_depend_on_neither_neighbours_nor_programs() -> None:
    where = paging([170, 171, 90, 12], [0, 0, 1, 2])
    keys = random(3 * BLOCKS, BLOCK_TOKENS, SIZE)
    q, weights = random(4, HEADS, SIZE), random(4, HEADS, dtype=torch.float32)
    together = scores_of(q, weights, keys, where)
    assert torch.equal(
        scores_of(q, weights, keys, where, programs=4).nan_to_num(), together.nan_to_num()
    )
    for row in range(3):
        own = slice(row, row + 1)
        alone = where._replace(
            position_T=where.position_T[own].clone(), sequence_T=where.sequence_T[own].clone()
        )
        alone_scores = scores_of(q[own].clone(), weights[own].clone(), keys, alone)
        assert torch.equal(alone_scores[0].nan_to_num(), together[row].nan_to_num())


def chosen_of(scores: torch.Tensor, where: Paging, top_k: int) -> latent.SelectedPositions:
    rows = scores.shape[0]
    cached = torch.full((rows, top_k), -7, dtype=torch.int32, device=DEVICE)
    chosen = latent.SelectedPositions(cached, ints([-7] * rows))
    indexer.select_positions(scores, where, chosen, block_tokens=BLOCK_TOKENS)
    return chosen


def wanted_positions(scores: torch.Tensor, position: int, top_k: int) -> list[int]:
    """The selection of the CPU model."""
    size = min(top_k, position + 1)
    if size == position + 1:
        return list(range(size))
    chosen = np.empty(size, dtype=np.int32)
    row = scores[: position + 1].cpu().numpy()
    _choose_positions(row, position + 1, size, chosen)
    return chosen.tolist()


@pytest.mark.parametrize("top_k", [1, 40, 2100])
def test_the_highest_scores_are_chosen_the_lower_position_first_among_equals(top_k: int) -> None:
    positions = [5000, 4500, 4095, 4000, -1, 25, 2100, 5100]
    blocks = 5120 // BLOCK_TOKENS
    where = paging(positions, [0, 1, 2, 0, 1, 2, 0, 1], blocks)
    scores = random(len(positions), 5120, dtype=torch.float32)
    scores[1] = scores[1].round()  # many equals on both sides of zero
    scores[2] = 0.0
    scores[2, ::3] = -0.0  # equal to the other zero
    scores[3, ::2] = scores[3, 7]
    scores[3, 100:130] = float("inf")
    scores[7] = scores[7] * 1e-5 - 3.0  # all share their first digits
    for row, position in enumerate(positions):
        scores[row, position + 1 :] = float("nan")
    chosen = chosen_of(scores, where, top_k)
    for row, position in enumerate(positions):
        assert int(chosen.last_T[row]) == min(position, top_k - 1)
        wanted = torch.tensor(wanted_positions(scores[row], position, top_k), dtype=torch.long)
        table = where.tables_SB[int(where.sequence_T[row])].cpu()
        cached = table[wanted // BLOCK_TOKENS] * BLOCK_TOKENS + wanted % BLOCK_TOKENS
        out = chosen.cached_TK[row].cpu()
        assert out[: len(wanted)].tolist() == cached.tolist()
        assert (out[len(wanted) :] == -7).all()


ATTENTION_HEADS, RANK, TURNED = 3, 32, 16


def attend(
    q: torch.Tensor,
    q_rotated: torch.Tensor,
    cache: latent.LatentCache,
    where: Paging,
    chosen: latent.SelectedPositions | None,
    at_once: int = 8,
) -> torch.Tensor:
    splits = (at_once, ATTENTION_HEADS, latent.num_splits(where.tables_SB.shape[1] * BLOCK_TOKENS))
    partials = Partials(
        poison(*splits, RANK, dtype=torch.float32),
        poison(*splits, dtype=torch.float32),
        poison(*splits, dtype=torch.float32),
    )
    out = poison(q.shape[0], ATTENTION_HEADS, RANK)
    latent.attend_latents(q, q_rotated, cache, where, partials, out, scale=0.2, chosen=chosen)
    return out


def test_rows_attend_to_what_was_chosen_alone_and_to_all_where_nothing_was() -> None:
    positions, top_k, blocks = [700, 299, 300, -1, 620], 300, 45
    where = paging(positions, [0, 1, 1, 2, 2], blocks)
    cache = latent.LatentCache(
        random(3 * blocks, BLOCK_TOKENS, RANK), random(3 * blocks, BLOCK_TOKENS, TURNED)
    )
    q, q_rotated = random(5, ATTENTION_HEADS, RANK), random(5, ATTENTION_HEADS, TURNED)
    scores = random(5, blocks * BLOCK_TOKENS, dtype=torch.float32)
    chosen = chosen_of(scores, where, top_k)
    out = attend(q, q_rotated, cache, where, chosen)
    for row in (0, 1, 2, 4):
        wanted = wanted_positions(scores[row], positions[row], top_k)
        at = torch.tensor(wanted, device=DEVICE)
        at_blocks = where.tables_SB[int(where.sequence_T[row])].long()[at // BLOCK_TOKENS]
        latents = cache.latent_BUR[at_blocks, at % BLOCK_TOKENS].double()
        keys = cache.key_BUW[at_blocks, at % BLOCK_TOKENS].double()
        own = q[row].double() @ latents.T + q_rotated[row].double() @ keys.T
        assert_close(out[row], (own * 0.2).softmax(-1) @ latents)
    assert not out[3].any(), "a row without a token gives zero"
    assert torch.equal(attend(q, q_rotated, cache, where, chosen, at_once=2), out)
    dense = attend(q, q_rotated, cache, where, None)
    assert torch.equal(out[1], dense[1]), "it sees all its positions"
    assert not torch.equal(out[2], dense[2])


SPARSE_TOP_K = 16
CONTEXT = BLOCKS_EACH * BLOCK_TOKENS
CHECKPOINT = {
    "vocab_size": 304,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "index_n_heads": 5,
    "index_head_dim": 16,
    "index_topk": SPARSE_TOP_K,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "v32"
    create_seeded_checkpoint(folder, 3, family="deepseek_v32", **CHECKPOINT)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> CudaModel:
    spec = read_model_spec(folder)
    model = load_cuda_model(
        folder,
        spec,
        slots_per_rank=spec.num_experts,
        device=DEVICE,
        dtype=DTYPE,
        progress=LoadProgress(SystemClock()),
    )
    layers = model.sizes.num_moe_layers
    model.loader.load(np.tile(np.arange(spec.num_experts, dtype=np.int16), (layers, 1)))
    return model


def decoder_of(model: CudaModel, *, top_k: int | None = SPARSE_TOP_K) -> Decoder:
    """The folder with another `index_topk`; with None, without the indexer."""
    sizes = model.sizes
    assert isinstance(sizes.attention, MlaShape)
    changes = {"index_top_k": top_k} if top_k else {"num_index_heads": 0, "index_head_dim": 0}
    sizes = replace(sizes, attention=replace(sizes.attention, **changes))
    options = DecoderOptions(
        kv_blocks=4 * BLOCKS_EACH,
        block_tokens=BLOCK_TOKENS,
        context_tokens_max=CONTEXT,
        decode_batch_sizes=(1, 4),
        prefill_tokens=24,
        prefill_sequences=4,
    )
    moe = LocalMoe(model.slots, top_k=sizes.top_k, step_tokens_max=24)
    decoder = Decoder(sizes, model.weights, moe, options)
    table = np.arange(sizes.num_experts, dtype=np.int32)
    decoder.use_slots(np.tile(table, (sizes.num_moe_layers, 1, 1)))
    if ON_CUDA:
        decoder.capture()
    return decoder


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, CHECKPOINT["vocab_size"], length).tolist()


def test_logits_beyond_what_is_chosen_are_those_of_the_cpu_model(
    folder: Path, model: CudaModel
) -> None:
    tokens, more = prompt(1, 27), 20 if ON_CUDA else 3
    new, logits = continue_alone(decoder_of(model), tokens, chunk=19, more=more)
    (run,) = open_ranks(folder, 1, block_tokens=BLOCK_TOKENS)
    whole = Chunk(np.array(tokens + new[:-1], dtype=np.int32), 0, list(range(BLOCKS_EACH)))
    exact = torch.from_numpy(run.logits(whole)[len(tokens) - 1 :])
    errors = (logits.cpu() - exact).norm(dim=-1) / exact.norm(dim=-1)
    if ON_CUDA:  # now and then bf16 chooses another position than float32 does
        assert float(errors.median()) < 5e-2
    else:
        assert float(errors.max()) < 1e-4


def test_a_context_that_outgrows_the_choice_gives_the_same_bits_in_any_batch(
    model: CudaModel,
) -> None:
    decoder = decoder_of(model)
    tokens = prompt(2, 24)
    alone, logits = continue_alone(decoder, tokens, chunk=24, more=1)
    again, other_chunks = continue_alone(decoder, tokens, chunk=13, more=1)
    assert alone == again
    step(decoder, {1: prompt(3, 20)}, [0])
    step(decoder, {0: tokens[:14], 1: [5], 2: prompt(4, 9)}, [0, 20, 0])
    ids, _ = step(decoder, {0: tokens[14:]}, [14])
    last, rows = step(decoder, {0: [int(ids[0])], 1: [7], 2: [9]}, [24, 21, 9])
    assert [int(ids[0]), int(last[0])] == alone
    if ON_CUDA:  # the interpreter's products are numpy's, which round by shape
        assert torch.equal(other_chunks, logits)
        assert torch.equal(rows[0], logits[1])


def test_up_to_what_is_chosen_the_bits_are_those_without_an_indexer(model: CudaModel) -> None:
    tokens = prompt(5, SPARSE_TOP_K - 2)
    _, sparse = continue_alone(decoder_of(model), tokens, chunk=16, more=3)
    _, dense = continue_alone(decoder_of(model, top_k=None), tokens, chunk=16, more=3)
    assert torch.equal(sparse[:3], dense[:3])
    assert not torch.equal(sparse[3], dense[3]), "the indexer has chosen"


def test_an_indexer_that_chooses_every_position_keeps_no_keys(model: CudaModel) -> None:
    for top_k, caches in ((CONTEXT - 1, 3), (CONTEXT, 2), (None, 2)):
        assert len(decoder_of(model, top_k=top_k).attention.cache()) == caches
