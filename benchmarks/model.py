"""Measures tokens per second of one rank's model, without engine or network, and the time of a
decode step by kernel. With --reference it compares with transformers' generate in the same run:
same checkpoint, same dtype of weights, same prompts, one thread each, taking turns.

    python -m benchmarks.model --reference --batch 1 8 32

Every figure is a median of --runs, after one run that does not count. Seconds are CPU time of the
thread, so that other work on the machine changes the ratios little. It still takes caches and
memory bandwidth, so figures to keep need a quiet machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np

from benchmarks.decode_profile import CountingExchange, DecodeProfile, measure_memory_rate
from gpu_worker.cpu.decoder import Decoder
from gpu_worker.cpu.registry import load_model
from gpu_worker.engine.step_batch import StepBatch
from gpu_worker.exchange.interface import Exchange
from gpu_worker.model_tools.scoring import EPOCH, load_all_experts
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from shared.model_spec import read_model_spec
from shared.types import Step

PROMPT_TOKENS = 64
NEW_TOKENS = 96
LONG_PROMPT_TOKENS = 512
PREFILL_CHUNK_TOKENS = 128
BLOCK_TOKENS = 16


class Generator(Protocol):
    def generate_seconds(self, prompts_SC: np.ndarray, num_tokens: int) -> float:
        """The thread's CPU time for so many new tokens of each prompt."""
        ...


class Rank:
    """A rank that holds every expert and runs sequences of equal length."""

    def __init__(self, folder: Path, sequences_max: int) -> None:
        blocks = -(-max(PROMPT_TOKENS + NEW_TOKENS, LONG_PROMPT_TOKENS) // BLOCK_TOKENS)
        self.model: Decoder = load_model(
            folder,
            slots_per_rank=read_model_spec(folder).num_experts,
            kv_blocks=sequences_max * blocks,
            block_tokens=BLOCK_TOKENS,
        )
        self.exchange: Exchange = load_all_experts(self.model)
        self.decode_seconds: list[float] = []
        """Of the steps of the last call but its prefill."""
        self._tables_SB = np.arange(sequences_max * blocks, dtype=np.int32).reshape(-1, blocks)
        self._steps = 0

    def generate_seconds(
        self,
        prompts_SC: np.ndarray,
        num_tokens: int,
        after_step: Callable[[float], None] = lambda _: None,
    ) -> float:
        """Calls `after_step` with the seconds of the prefill, then with those of each decode
        step."""
        began = time.thread_time()
        chunks = range(0, prompts_SC.shape[1], PREFILL_CHUNK_TOKENS)
        for start in chunks:
            next_S = self._step(prompts_SC[:, start : start + PREFILL_CHUNK_TOKENS], start)
        prefill_s = time.thread_time() - began
        after_step(prefill_s)
        self.decode_seconds = []
        for start in range(prompts_SC.shape[1], prompts_SC.shape[1] + num_tokens - 1):
            began = time.thread_time()
            next_S = self._step(next_S[:, None], start)
            self.decode_seconds.append(time.thread_time() - began)
            after_step(self.decode_seconds[-1])
        return prefill_s + sum(self.decode_seconds)

    def _step(self, tokens_SC: np.ndarray, start: int) -> np.ndarray:
        """Runs the same number of tokens of every sequence; returns the next token of each,
        greedily."""
        sequences, count = tokens_SC.shape
        batch = StepBatch(
            token_ids_T=tokens_SC.ravel().astype(np.int32),
            position_T=np.tile(np.arange(start, start + count, dtype=np.int32), sequences),
            sequence_T=np.repeat(np.arange(sequences, dtype=np.int32), count),
            block_tables_SB=self._tables_SB[:sequences],
            logits_rows_R=np.arange(1, sequences + 1, dtype=np.int32) * count - 1,
        )
        step = Step(self._steps)
        self._steps += 1
        self.exchange.begin_step(EPOCH, step, num_tokens=batch.num_tokens, has_work=True)
        return self.model.forward(batch, self.exchange).logits_RV.argmax(axis=1)


def compare_first_token(
    rank: Rank, reference: Generator | None, prompts_SC: np.ndarray, runs: int
) -> str:
    our_s, their_s = _in_turn(
        runs,
        lambda: rank.generate_seconds(prompts_SC, 1),
        lambda: reference.generate_seconds(prompts_SC, 1) if reference else 0.0,
    )
    line = f"first token of a prompt of {prompts_SC.shape[1]}: {1e3 * our_s:.0f} ms"
    if reference is None:
        return line
    return f"{line}; transformers {1e3 * their_s:.0f} ms ({their_s / our_s:.2f} times)"


def compare_batch(
    rank: Rank, reference: Generator | None, prompts_SC: np.ndarray, runs: int
) -> str:
    decodes: list[float] = []

    def ours() -> float:
        seconds = rank.generate_seconds(prompts_SC, NEW_TOKENS)
        decodes.append(sum(rank.decode_seconds))
        return seconds

    our_s, their_s = _in_turn(
        runs,
        ours,
        lambda: reference.generate_seconds(prompts_SC, NEW_TOKENS) if reference else 0.0,
    )
    sequences = prompts_SC.shape[0]
    decode_rate = sequences * (NEW_TOKENS - 1) / median(decodes[1:])
    our_rate = sequences * NEW_TOKENS / our_s
    line = f"batch {sequences:2}: decode {decode_rate:5.0f} tokens/s, whole {our_rate:5.0f}"
    if reference is None:
        return line
    their_rate = sequences * NEW_TOKENS / their_s
    return f"{line}; transformers, whole {their_rate:4.0f} ({their_s / our_s:.2f} times)"


def profile(rank: Rank, prompts_SC: np.ndarray, memory_rate: float) -> str:
    plain = rank.exchange
    rank.exchange = counting = CountingExchange(plain)
    with DecodeProfile(rank.model) as steps:
        rank.generate_seconds(prompts_SC, NEW_TOKENS, steps.end_step)
    rank.exchange = plain
    of_decodes = counting.num_slots[rank.model.num_moe_layers :]
    title = f"a decode step at batch {prompts_SC.shape[0]}:"
    return f"{title}\n{steps.table(of_decodes, memory_rate)}"


def _in_turn(runs: int, *measures: Callable[[], float]) -> list[float]:
    """The median of each measure. The measures take turns."""
    rounds = [[measure() for measure in measures] for _ in range(runs + 1)]
    return [median(values) for values in zip(*rounds[1:], strict=True)]


def report(folder: Path, batches: list[int], runs: int, with_reference: bool) -> None:
    reference: Generator | None = None
    if with_reference:
        from benchmarks.transformers_model import TransformersModel

        reference = model = TransformersModel(folder)
        print(model.description)
    rank = Rank(folder, max(batches))
    rng = np.random.default_rng(0)

    def prompts(sequences: int, num_tokens: int) -> np.ndarray:
        return rng.integers(0, rank.model.vocab_size, (sequences, num_tokens))

    memory_rate = measure_memory_rate()
    print(compare_first_token(rank, reference, prompts(1, LONG_PROMPT_TOKENS), runs), flush=True)
    for sequences in batches:
        prompts_SC = prompts(sequences, PROMPT_TOKENS)
        print(compare_batch(rank, reference, prompts_SC, runs), flush=True)
        print(profile(rank, prompts_SC, memory_rate), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"A prompt has {PROMPT_TOKENS} tokens and gets {NEW_TOKENS} new ones, the prefill "
        "among the time of the whole.\nA profile is of the model's compiled kernels: attend is "
        "the attention half of a layer, with its dense products;\nwhat is between kernels is "
        "Python. With --reference a run takes two to five minutes, without half a minute.",
    )
    parser.add_argument("--model", type=Path, help="default: a seeded one, made for the run")
    parser.add_argument("--reference", action="store_true", help="run transformers as well")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], metavar="SEQUENCES")
    parser.add_argument("--runs", type=int, default=5, help="of which medians are taken")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch) / "model"
        if options.model is None:
            create_seeded_checkpoint(folder)
        report(folder, options.batch, options.runs, options.reference)


if __name__ == "__main__":
    main()
