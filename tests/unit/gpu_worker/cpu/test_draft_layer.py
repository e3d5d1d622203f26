"""The layer of multi-token prediction against its definition: section 2.2 of the report on
DeepSeek-V3, with the names and the order of the published weights. Its decoder layer is
transformers'."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from gpu_worker.checkpoint.shards import read_tensors
from gpu_worker.cpu.registry import load_model
from gpu_worker.engine.step_batch import StepBatch
from shared.errors import CheckpointError
from shared.model_spec import read_model_spec, with_drafts
from tests.support.draft_checkpoints import (
    FAMILIES,
    Tensors,
    edit_tensors,
    save_with_drafts,
)
from tests.unit.gpu_worker.cpu.reference import VOCAB, save_checkpoint
from tests.unit.gpu_worker.cpu.runs import Chunk, RankRun, make_batch, open_ranks, step_together

LENGTH = 21
TABLE = (5, 2, 9, 0, 7, 3)
TOLERANCE = 2e-4


def tokens_of(seed: int) -> NDArray[np.int32]:
    """One more than are run: the last row's next one."""
    return np.random.default_rng(seed).integers(0, VOCAB, LENGTH + 1).astype(np.int32)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_drafts(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="module")
def run(folder: Path) -> RankRun:
    return open_ranks(folder, 1, speculative_tokens=1)[0]


def drafts(run: RankRun, tokens: NDArray[np.int32], begin: int, end: int) -> NDArray[np.float32]:
    """Runs rows begin … end-1, whose next tokens are known; the draft layer's logits of each."""
    batch = make_batch([Chunk(tokens[begin:end], begin, TABLE)])
    run.step(batch)
    rows_R = np.arange(end - begin, dtype=np.int32)
    return run.model.draft(batch, tokens[begin + 1 : end + 1], rows_R, run.exchange)


def transformers_model(raw: dict[str, Any], tensors: Tensors, folder: Path) -> Any:
    """Of these tensors, through a folder of its own."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    model, loading = getattr(transformers, raw["architectures"][0]).from_pretrained(
        folder,
        dtype=torch.float32,
        experts_implementation="eager",
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not loading["missing_keys"]
    return model.eval()


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@torch.no_grad()
def reference_drafts(folder: Path, tokens: NDArray[np.int32], scratch: Path) -> NDArray[np.float32]:
    """`[LENGTH, V]`: h' = M [norm(Emb(next)); norm(h)], one decoder layer over h', and the head."""
    raw = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    layer = f"model.layers.{raw['num_hidden_layers']}."
    decoder = transformers_model(
        raw, {n: t for n, t in tensors.items() if not n.startswith(layer)}, scratch / "decoder"
    )
    ids = torch.from_numpy(tokens.astype(np.int64))
    h = decoder.model(ids[None, :-1]).last_hidden_state[0]  # behind the last norm
    own = {n.removeprefix(layer): t for n, t in tensors.items() if n.startswith(layer)}
    eps = raw["rms_norm_eps"]
    embedded = own["embed_tokens.weight"][ids[1:]]
    joined = torch.cat(
        [norm(embedded, own["enorm.weight"], eps), norm(h, own["hnorm.weight"], eps)], dim=-1
    )
    joined = joined @ own["eh_proj.weight"].T
    parts = {
        f"model.layers.0.{name}": tensor
        for name, tensor in own.items()
        if name.startswith(("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"))
    }
    parts |= {
        "model.embed_tokens.weight": own["embed_tokens.weight"],
        "model.norm.weight": own["shared_head.norm.weight"],
        "lm_head.weight": own["shared_head.head.weight"],
    }
    alone = raw | {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    block = transformers_model(alone, parts, scratch / "block")
    return np.asarray(block(inputs_embeds=joined[None]).logits[0].numpy())


def test_the_layer_computes_its_definition(run: RankRun, folder: Path, tmp_path: Path) -> None:
    tokens = tokens_of(1)
    ours = drafts(run, tokens, 0, LENGTH)
    expected = reference_drafts(folder, tokens, tmp_path)
    assert np.abs(ours - expected).max() < TOLERANCE * np.abs(expected).max()


def test_an_embedding_and_a_head_of_its_own_are_used(tmp_path: Path) -> None:
    folder = save_with_drafts(tmp_path / "model")

    def edit(tensors: Tensors, layer: str) -> Tensors:
        names = (f"{layer}.embed_tokens.weight", f"{layer}.shared_head.head.weight")
        return {name: tensors[name].flip(0) for name in names}

    edit_tensors(folder, edit)
    tokens = tokens_of(2)
    (run,) = open_ranks(folder, 1, speculative_tokens=1)
    ours, expected = drafts(run, tokens, 0, LENGTH), reference_drafts(folder, tokens, tmp_path)
    assert np.abs(ours - expected).max() < TOLERANCE * np.abs(expected).max()


def test_without_copies_the_decoders_are_used(tmp_path: Path) -> None:
    folder = save_with_drafts(tmp_path / "model")
    tokens = tokens_of(3)
    (run,) = open_ranks(folder, 1, speculative_tokens=1)
    expected = drafts(run, tokens, 0, LENGTH)
    kept = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if not name.endswith((".3.embed_tokens.weight", ".shared_head.head.weight"))
    }
    assert len(kept) == len(read_tensors(folder)) - 2
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (run,) = open_ranks(folder, 1, speculative_tokens=1)
    assert np.array_equal(drafts(run, tokens, 0, LENGTH), expected)


def test_chunks_and_ranks_change_no_bit(run: RankRun, folder: Path) -> None:
    tokens = tokens_of(4)
    whole = drafts(run, tokens, 0, LENGTH)
    cuts = [0, 5, 6, 7, 16, LENGTH]
    parts = [drafts(run, tokens, a, b) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), whole)
    runs = open_ranks(folder, 3, speculative_tokens=1)
    batches = [make_batch([Chunk(tokens_of(s)[:LENGTH], 0, TABLE)]) for s in (4, 5)]
    step_together(runs, [*batches, make_batch([])])
    assert np.array_equal(draft_together(runs, batches, [tokens, tokens_of(5)])[0], whole)


def draft_together(
    runs: list[RankRun], batches: list[StepBatch], tokens: list[NDArray[np.int32]]
) -> list[NDArray[np.float32]]:
    """After a step of all ranks, of which the last has no tokens. Of every row."""
    nothing = np.zeros(0, dtype=np.int32)
    every = np.arange(LENGTH, dtype=np.int32)
    wanted = [(batch, each[1:], every) for batch, each in zip(batches, tokens, strict=True)]
    wanted.append((make_batch([]), nothing, nothing))
    with ThreadPoolExecutor(len(runs)) as pool:
        futures = [
            pool.submit(run.model.draft, *of_rank, run.exchange)
            for run, of_rank in zip(runs, wanted, strict=True)
        ]
        return [future.result(timeout=60) for future in futures]


def test_the_decoder_computes_the_same_with_it(run: RankRun, folder: Path) -> None:
    tokens = tokens_of(6)[:LENGTH]
    (plain,) = open_ranks(folder, 1)
    assert run.model.num_moe_layers == plain.model.num_moe_layers + 1
    assert len(run.model.attention) == len(plain.model.attention) + 1
    chunk = Chunk(tokens, 0, TABLE)
    assert np.array_equal(run.logits(chunk), plain.logits(chunk))


@pytest.mark.parametrize("variant", ["deepseek_v3", "deepseek_v2", "qwen3_moe", "qwen3"])
def test_a_checkpoint_without_the_layer_cannot_draft(tmp_path: Path, variant: str) -> None:
    folder = save_checkpoint(tmp_path, variant)
    with pytest.raises(CheckpointError, match="needs a layer of multi-token prediction"):
        with_drafts(read_model_spec(folder), 1)
    assert with_drafts(read_model_spec(folder), 0) == read_model_spec(folder)


def test_a_layer_that_the_config_names_and_the_files_lack_is_missed(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, "glm4_moe")
    config = json.loads((folder / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.3\."):
        load_model(folder, slots_per_rank=12, kv_blocks=4, block_tokens=4, speculative_tokens=1)
