"""A context of 131,072 tokens, stretched by YaRN: against transformers, and decode against prefill
to the bit. Runs on a CUDA device only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: there is no CUDA device here")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import transformers

from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.cuda.decoder import Decoder, DecoderOptions
from gpu_worker.cuda.model_loading import load_cuda_model
from gpu_worker.cuda.stages.moe_stage import LocalMoe
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from shared.clock import SystemClock
from shared.model_spec import read_model_spec
from tests.unit.gpu_worker.cpu.runs import Chunk, make_batch

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
CONTEXT, CHUNK, BLOCK_TOKENS, VOCAB = 131_072, 4_096, 16, 304
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 64,
    "max_position_embeddings": CONTEXT,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150_000.0,
        "factor": 32.0,
        "original_max_position_embeddings": CONTEXT // 32,
    },
}
GPT_OSS = {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]}
TABLE = np.random.default_rng(0).permutation(CONTEXT // BLOCK_TOKENS).tolist()
TOKENS = np.random.default_rng(1).integers(0, VOCAB, CONTEXT).astype(np.int32)


@pytest.mark.parametrize(("family", "more"), [("qwen3", {}), ("gpt_oss", GPT_OSS)], ids=str)
def test_the_last_of_131072_tokens(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / family
    create_seeded_checkpoint(folder, 5, family=family, dtype=torch.bfloat16, **(SIZES | more))
    decoder = decoder_of(folder)
    last = CONTEXT - 1
    for start in range(0, CONTEXT, CHUNK):
        of_prefill = logits_of(decoder, start, start + CHUNK)
    assert torch.equal(logits_of(decoder, last, CONTEXT), of_prefill), "decode"
    assert torch.equal(logits_of(decoder, CONTEXT - 100, CONTEXT), of_prefill), "a short chunk"
    theirs = reference(folder)
    assert float((of_prefill - theirs).norm() / theirs.norm()) < 5e-2


def decoder_of(folder: Path) -> Decoder:
    spec = read_model_spec(folder)
    model = load_cuda_model(
        folder,
        spec,
        slots_per_rank=spec.num_experts,
        device=DEVICE,
        dtype=torch.bfloat16,
        progress=LoadProgress(SystemClock()),
    )
    held = np.tile(np.arange(spec.num_experts, dtype=np.int16), (spec.num_moe_layers, 1))
    model.loader.load(held)
    options = DecoderOptions(
        kv_blocks=CONTEXT // BLOCK_TOKENS,
        block_tokens=BLOCK_TOKENS,
        context_tokens_max=CONTEXT,
        decode_batch_sizes=(1,),
        prefill_tokens=CHUNK,
        prefill_sequences=1,
    )
    moe = LocalMoe(
        model.slots,
        top_k=model.sizes.top_k,
        step_tokens_max=CHUNK,
        clamped=model.sizes.clamped_experts,
    )
    decoder = Decoder(model.sizes, model.weights, moe, options)
    decoder.use_slots(held.astype(np.int32)[:, None])
    return decoder


def logits_of(decoder: Decoder, start: int, end: int) -> torch.Tensor:
    batch = make_batch([Chunk(TOKENS[start:end], start, TABLE)], all_rows=False)
    pending = decoder.launch(batch)
    pending.ids()
    return pending.logits_RV[0].float().clone()


def reference(folder: Path) -> torch.Tensor:
    """transformers' logits in float32, with an attention that never holds all scores."""
    transformers.AttentionInterface.register("some_rows_at_a_time", attend)
    architecture = read_model_spec(folder).architecture
    model = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="some_rows_at_a_time"
    )
    ids = torch.from_numpy(TOKENS.astype(np.int64))[None].to(DEVICE)
    with torch.no_grad():
        logits = model.to(DEVICE).eval()(ids, logits_to_keep=1, use_cache=False).logits
    return logits[0, 0].float()


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """A transformers attention: heads in the second axis, tokens in the third."""
    group, rows = query.shape[1] // key.shape[1], 1024
    key, value = (x[0].repeat_interleave(group, dim=0) for x in (key, value))
    position = torch.arange(key.shape[1], device=key.device)
    out = []
    for start in range(0, len(position), rows):
        mine = slice(start, start + rows)
        scores = query[0][:, mine] @ key[:, : start + rows].transpose(1, 2) * scaling
        behind = position[mine, None] - position[None, : start + rows]
        hidden = behind < 0
        if sliding_window is not None:
            hidden |= behind >= sliding_window
        scores = scores.masked_fill(hidden, float("-inf"))
        if s_aux is not None:
            scores = torch.cat([scores, s_aux[:, None, None].expand(-1, rows, 1)], dim=-1)
        out.append(scores.softmax(-1)[..., : start + rows] @ value[:, : start + rows])
    return torch.cat(out, dim=1).transpose(0, 1)[None], None
