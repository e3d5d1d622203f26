"""Tokens per second of one rank's model, without engine or network, against transformers' generate
on the same checkpoint and one thread: `python -m bench.model [--model FOLDER] [--reference]`.
Counts the thread's own CPU time, so that a busy machine does not blur the ratio."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from gpu_worker.model.decoder import Decoder
from gpu_worker.model.registry import load_model
from gpu_worker.model.scoring import EPOCH, whole_exchange
from gpu_worker.model.seeded_checkpoint import create_seeded_checkpoint
from gpu_worker.step_batch import StepBatch
from shared.types import Step

PROMPT_TOKENS = 64
DECODE_STEPS = 96
BLOCK_TOKENS = 16
BATCHES = (1, 8, 32)
LONG_PROMPT_TOKENS = 512
PREFILL_CHUNK_TOKENS = 128


class Bench:
    """One rank that holds every expert."""

    def __init__(self, folder: Path) -> None:
        self.model: Decoder = load_model(
            folder, slots_per_rank=64, kv_blocks=1024, block_tokens=BLOCK_TOKENS
        )
        self.exchange = whole_exchange(self.model)
        self.steps = 0

    def step(self, tokens_SC: np.ndarray, start: int) -> np.ndarray:
        """The same number of tokens of every sequence; the next token of each, greedily."""
        sequences, count = tokens_SC.shape
        blocks = 1024 // max(BATCHES)
        batch = StepBatch(
            token_ids_T=tokens_SC.ravel().astype(np.int32),
            position_T=np.tile(np.arange(start, start + count, dtype=np.int32), sequences),
            sequence_T=np.repeat(np.arange(sequences, dtype=np.int32), count),
            block_tables_SB=np.arange(sequences * blocks, dtype=np.int32).reshape(-1, blocks),
            logits_rows_R=np.arange(1, sequences + 1, dtype=np.int32) * count - 1,
        )
        num_tokens = batch.num_tokens
        self.exchange.begin_step(EPOCH, Step(self.steps), num_tokens=num_tokens, has_work=True)
        self.steps += 1
        return self.model.forward(batch, self.exchange).logits_RV.argmax(axis=1)

    def prefill_seconds(self, prompt_C: np.ndarray) -> float:
        began = time.thread_time()
        for first in range(0, prompt_C.size, PREFILL_CHUNK_TOKENS):
            self.step(prompt_C[None, first : first + PREFILL_CHUNK_TOKENS], first)
        return time.thread_time() - began

    def generate_seconds(self, prompts_SC: np.ndarray) -> tuple[float, float]:
        """Of the prefill, then of DECODE_STEPS - 1 decodes."""
        began = time.thread_time()
        next_S = self.step(prompts_SC, 0)
        middle = time.thread_time()
        for n in range(DECODE_STEPS - 1):
            next_S = self.step(next_S[:, None], PROMPT_TOKENS + n)
        return middle - began, time.thread_time() - middle


def reference_seconds(folder: Path, prompts_SC: np.ndarray) -> float:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(prompts_SC)
    options = {"do_sample": False, "pad_token_id": 0, "temperature": None, "top_p": None}
    model.generate(ids[:, :4], attention_mask=torch.ones_like(ids[:, :4]), max_new_tokens=2)
    began = time.thread_time()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=DECODE_STEPS,
        min_new_tokens=DECODE_STEPS,
        **options,
    )
    return time.thread_time() - began


def report(folder: Path, with_reference: bool) -> None:
    bench = Bench(folder)
    rng = np.random.default_rng(0)
    prompt_C = rng.integers(0, bench.model.vocab_size, LONG_PROMPT_TOKENS)
    bench.prefill_seconds(prompt_C)
    rate = LONG_PROMPT_TOKENS / bench.prefill_seconds(prompt_C)
    print(f"prefill of {LONG_PROMPT_TOKENS} tokens: {rate:.0f} tokens/s")
    for sequences in BATCHES:
        prompts_SC = rng.integers(0, bench.model.vocab_size, (sequences, PROMPT_TOKENS))
        prefill_s, decode_s = bench.generate_seconds(prompts_SC)
        decode_rate = sequences * (DECODE_STEPS - 1) / decode_s
        whole_rate = sequences * DECODE_STEPS / (prefill_s + decode_s)
        line = f"batch {sequences:2}: decode {decode_rate:.0f} tokens/s, whole {whole_rate:.0f}"
        if with_reference:
            reference = sequences * DECODE_STEPS / reference_seconds(folder, prompts_SC)
            line += f"; transformers {reference:.0f} ({whole_rate / reference:.1f} times)"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: a seeded one, made for the run")
    parser.add_argument("--reference", action="store_true", help="run transformers as well")
    options = parser.parse_args()
    if options.model is not None:
        report(options.model, options.reference)
        return
    with tempfile.TemporaryDirectory() as scratch:
        create_seeded_checkpoint(Path(scratch) / "model")
        report(Path(scratch) / "model", options.reference)


if __name__ == "__main__":
    main()
