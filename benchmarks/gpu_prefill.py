"""How fast a decoder on a card takes prompts of several lengths, and whether chunks and decode give
the same bits. Part of `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
_CHUNK_TOKENS = 300


def prefill_rates(
    decoder: Any, block_tokens: int, median_ms: Callable[[Callable[[], Any], int], float]
) -> dict[str, Any]:
    """Of one prompt from its beginning, in one step, for each of LENGTHS. `bits_equal`: the logits
    of the longest one's last token are those after chunks, and those of a decode."""
    prompt = np.random.default_rng(0).integers(0, 100_000, LENGTHS[-1]).astype(np.int32)

    def logits(start: int, count: int) -> torch.Tensor:
        pending = decoder.launch(_batch(prompt, start, count, block_tokens))
        pending.ids()
        found: torch.Tensor = pending.logits_RV[0].clone()
        return found

    result: dict[str, Any] = {}
    for tokens in LENGTHS:
        milliseconds = median_ms(lambda n=tokens: logits(0, n), 3)  # type: ignore[misc]
        result[str(tokens)] = {"ms": milliseconds, "tokens_per_s": tokens * 1e3 / milliseconds}
    last = LENGTHS[-1]
    whole = logits(0, last)
    in_chunks = [
        logits(start, min(_CHUNK_TOKENS, last - start)) for start in range(0, last, _CHUNK_TOKENS)
    ]
    logits(0, last - 1)
    by_decode = logits(last - 1, 1)
    equal = torch.equal(whole, in_chunks[-1]) and torch.equal(whole, by_decode)
    return {"bits_equal": equal, **result}


def _batch(prompt: np.ndarray, start: int, count: int, block_tokens: int) -> Any:
    from gpu_worker.engine.step_batch import StepBatch

    blocks = -(-(start + count) // block_tokens)
    return StepBatch(
        token_ids_T=prompt[start : start + count],
        position_T=np.arange(start, start + count, dtype=np.int32),
        sequence_T=np.zeros(count, dtype=np.int32),
        block_tables_SB=np.arange(blocks, dtype=np.int32)[None],
        logits_rows_R=np.array([count - 1], dtype=np.int32),
    )
