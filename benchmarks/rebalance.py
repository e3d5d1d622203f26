"""Measures what moving experts by their load gains where tokens prefer some of them.

    python -m benchmarks.rebalance --pairs 5

Two instances of CPU ranks serve one checkpoint whose routers prefer experts by Zipf's law, each
layer other ones. One rebalances, one does not. Once the first has, both get the same prompts in
turn, in changing order. Beside the rate of tokens, each round gives what does not depend on other
work on the machine: the pairs of a token and an expert that each rank's slots compute, and the CPU
time of the rank processes. The answers of both instances must be the same.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from cli.bench.stream_client import random_prompts, run_all, stream_client
from cli.bench.temporary_instance import temporary_instance
from cli.observe.read_view import read_view
from cli.run_dir import Target
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from shared.clock import SystemClock
from shared.errors import Unavailable
from shared.rank_query import query_expert_counts

EXPERTS, TOP_K, LAYERS, HIDDEN, INNER = 64, 4, 4, 192, 384
CALIBRATION_TOKENS = 4000
CALIBRATION_ROUNDS = 300
BALANCED_WITHIN_S = 240.0


def zipf_biases(rng: np.random.Generator, exponent: float) -> NDArray[np.float32]:
    """`[E]`: what to add to random scores of variance 1, so that the k best of them are chosen as
    often as Zipf's law says, as far as no expert can be chosen more than once by a token."""
    wanted = 1.0 / np.arange(1, EXPERTS + 1) ** exponent
    wanted = np.minimum(0.95, TOP_K * wanted / wanted.sum())
    scores_TE = rng.standard_normal((CALIBRATION_TOKENS, EXPERTS))
    bias_E = np.log(wanted)
    for _ in range(CALIBRATION_ROUNDS):
        best_TK = np.argpartition(-(scores_TE + bias_E), TOP_K, axis=1)[:, :TOP_K]
        seen_E = np.bincount(best_TK.ravel(), minlength=EXPERTS) / CALIBRATION_TOKENS
        bias_E += 0.2 * np.log((wanted + 1e-3) / (seen_E + 1e-3))
    return rng.permutation(bias_E).astype(np.float32)


def write_skewed_checkpoint(folder: Path, exponent: float) -> None:
    create_seeded_checkpoint(
        folder,
        num_shards=1,
        family="gpt_oss",
        hidden_size=HIDDEN,
        vocab_size=4096,
        num_hidden_layers=LAYERS,
        layer_types=["full_attention"] * LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        intermediate_size=INNER,
    )
    rng, path = np.random.default_rng(1), folder / "model.safetensors"
    tensors = load_file(path)
    for name in sorted(tensors):
        if name.endswith("router.bias"):
            tensors[name] = torch.from_numpy(zipf_biases(rng, exponent))
    save_file(tensors, path, metadata={"format": "pt"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """`imbalance` is the busiest rank's pairs over the mean, averaged over layers. `cpu_busiest_s`
    is the CPU time of the rank process that used most."""

    tokens_per_s: float
    imbalance: float
    cpu_busiest_s: float
    cpu_s: float
    answers: tuple[tuple[int, ...], ...]


class MeasuredInstance:
    def __init__(self, target: Target) -> None:
        assert target.url is not None
        self._target, self._url = target, target.url

    async def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Round:
        clock = SystemClock()
        pairs, cpu_s = await self._computed(), await self._cpu_s()
        began = clock.now()
        async with stream_client(self._url, clock) as client:
            records = await run_all(client, prompts, new_tokens)
        took_s = clock.now() - began
        if failed := [r.error for r in records if r.error is not None]:
            raise Unavailable(f"{len(failed)} requests failed: {failed[0]}")
        new_pairs = (await self._computed()) - pairs
        used_s = [after - before for after, before in zip(await self._cpu_s(), cpu_s, strict=True)]
        return Round(
            tokens_per_s=sum(len(r.ids) for r in records) / took_s,
            imbalance=float((new_pairs.max(axis=0) / new_pairs.mean(axis=0)).mean()),
            cpu_busiest_s=max(used_s),
            cpu_s=sum(used_s),
            answers=tuple(tuple(r.ids) for r in records),
        )

    async def cause(self) -> str:
        expert_map = (await read_view(self._target)).expert_map
        return "" if expert_map is None else expert_map.cause

    async def _computed(self) -> NDArray[np.int64]:
        """`[R, L]`."""
        records = (await read_view(self._target)).ranks
        counts = await query_expert_counts(records, self._target.access())
        found = [counts[record.rank] for record in sorted(records, key=lambda r: r.rank)]
        if any(each is None for each in found):
            raise Unavailable("a rank does not answer")
        rows = [np.frombuffer(each.computed, "<u4") for each in found if each is not None]
        return np.stack(rows).astype(np.int64)

    async def _cpu_s(self) -> list[float]:
        pids = [
            record.pid
            for record in sorted((await read_view(self._target)).ranks, key=lambda r: r.rank)
        ]
        return [cpu_s(pid) for pid in pids]


def cpu_s(pid: int) -> float:
    """Of all threads that live."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


async def measure(arguments: argparse.Namespace, model: Path) -> None:
    flags = [
        *("--model", str(model), "--device", "cpu", "--ranks", str(arguments.ranks)),
        *("--redundant-experts", str(arguments.redundant)),
        *("--slots-per-rank", str(arguments.slots)),
    ]
    environment = {
        "STARFISH_RANK_REPLICAS": "spread",
        "STARFISH_CONTROL_PLANE_LOAD_TIME_CONSTANT_S": "10",
        "STARFISH_CONTROL_PLANE_HEAL_AFTER_S": "1",
    }
    switch = "STARFISH_CONTROL_PLANE_REBALANCE"
    async with AsyncExitStack() as stack:
        instances = {}
        for name, value in (("moved", "true"), ("still", "false")):
            target = await stack.enter_async_context(
                temporary_instance(
                    [*flags, "--instance", f"rebalance-{name}"],
                    environment=environment | {switch: value},
                )
            )
            instances[name] = MeasuredInstance(target)
        prompts = random_prompts(0, arguments.streams, 16)
        first = await instances["moved"].run(prompts, arguments.tokens)
        print(f"before the rebalance: imbalance {first.imbalance:.2f}", flush=True)
        async with asyncio.timeout(BALANCED_WITHIN_S):
            seed = 1000
            while not (await instances["moved"].cause()).startswith("healed"):
                seed += 1
                load = random_prompts(seed, arguments.streams, 16)
                await instances["moved"].run(load, arguments.tokens)
            await asyncio.sleep(5)
        rounds: dict[str, list[Round]] = {name: [] for name in instances}
        for pair in range(arguments.pairs):
            prompts = random_prompts(pair, arguments.streams, 16)
            names = list(instances) if pair % 2 else list(instances)[::-1]
            for name in names:
                rounds[name].append(await instances[name].run(prompts, arguments.tokens))
            assert rounds["moved"][-1].answers == rounds["still"][-1].answers, "tokens differ"
        report(rounds)


def report(rounds: dict[str, list[Round]]) -> None:
    for name, of_one in rounds.items():
        print(
            f"{name}: {statistics.median(r.tokens_per_s for r in of_one):.0f} tokens/s, imbalance "
            f"{statistics.median(r.imbalance for r in of_one):.2f}, CPU of the busiest rank "
            f"{statistics.median(r.cpu_busiest_s for r in of_one):.2f} s, of all "
            f"{statistics.median(r.cpu_s for r in of_one):.2f} s"
        )
    pairs = list(zip(rounds["moved"], rounds["still"], strict=True))
    rate = statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in pairs)
    busiest = statistics.median(a.cpu_busiest_s / b.cpu_busiest_s for a, b in pairs)
    print(f"median over {len(pairs)} pairs: tokens/s x {rate:.2f}, busiest rank x {busiest:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--slots", type=int, default=40, help="of each rank and layer")
    parser.add_argument("--redundant", type=int, default=12)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--zipf", type=float, default=1.0, help="the law's exponent")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="starfish-rebalance-") as folder:
        model = Path(folder) / "model"
        write_skewed_checkpoint(model, arguments.zipf)
        asyncio.run(measure(arguments, model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
