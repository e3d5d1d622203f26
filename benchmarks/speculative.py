"""Speculative decoding on CPU ranks of one host: the same server with drafts and without. Both
instances run all the time, and the load goes to one after the other, so that other work on the
machine affects both alike. Prints medians of tokens per second, and the share of right drafts.

The model has GLM-4.5's layers in the reference model's sizes. Random weights have no layer that
guesses well, so `--guesses good` makes a decoder that is easy to guess; `random` shows what drafts
cost that are never right.

    python -m benchmarks.speculative --ranks 4 --rounds 5 --concurrency 1,8,32 --guesses good
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median

from rich.console import Console

from cli.bench.loads import ServeLoad
from cli.bench.serve import ServeRow, measure
from cli.bench.temporary_instance import temporary_instance
from cli.bench.temporary_options import TemporaryInstanceOptions
from cli.run_dir import Target
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from gpu_worker.model_tools.seeded_configs import SEEDED_CONFIGS
from gpu_worker.model_tools.seeded_drafts import Guesses
from shared.clock import SystemClock
from shared.errors import Unavailable

_REFERENCE = SEEDED_CONFIGS["qwen3_moe"]
CHANGES = {
    **{
        key: _REFERENCE[key]
        for key in (
            *("vocab_size", "num_hidden_layers", "hidden_size", "max_position_embeddings"),
            *("num_attention_heads", "num_key_value_heads", "head_dim"),
            *("moe_intermediate_size", "intermediate_size", "num_experts_per_tok"),
        )
    },
    "n_routed_experts": _REFERENCE["num_experts"],
    "n_group": 1,
}


async def start(stack: AsyncExitStack, model: Path, ranks: int, drafts: int) -> Target:
    own = TemporaryInstanceOptions(
        model=model, ranks=ranks, device="cpu", speculative_tokens=drafts
    )
    name = f"speculative-{drafts}-{os.getpid()}"
    return await stack.enter_async_context(
        temporary_instance([*own.flags(), "--instance", name], environment=own.environment())
    )


async def sample(target: Target, load: ServeLoad) -> ServeRow:
    """Raises Unavailable if a request fails."""
    if target.url is None:
        raise Unavailable("the instance has no gateway")
    (row,) = await measure(target.url, load, SystemClock(), target)
    if row.errors:
        raise Unavailable(f"{row.errors} requests failed")
    return row


async def run(
    model: Path, ranks: int, concurrencies: list[int], rounds: int, console: Console
) -> None:
    async with AsyncExitStack() as stack:
        plain = await start(stack, model, ranks, 0)
        drafting = await start(stack, model, ranks, 1)
        for concurrency in concurrencies:
            load = ServeLoad(
                concurrency=str(concurrency),
                prompt_tokens=32,
                new_tokens=96,
                rounds=3 if concurrency < 8 else 1,
            )
            rates: dict[str, list[float]] = {"without": [], "with": []}
            shares: list[float] = []
            for _ in range(rounds):
                for title, target in (("without", plain), ("with", drafting)):
                    row = await sample(target, load)
                    rates[title].append(row.tokens_per_s)
                    shares += [] if row.right_drafts is None else [row.right_drafts]
            without, speculative = median(rates["without"]), median(rates["with"])
            console.print(
                f"{ranks} ranks, concurrency {concurrency:3}: {without:8.1f} tokens/s without, "
                f"{speculative:8.1f} with ({speculative / without:.2f}x), "
                f"{median(shares):.0%} of drafts right"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--guesses", choices=[each.value for each in Guesses], default="good")
    args = parser.parse_args()
    concurrencies = [int(each) for each in args.concurrency.split(",")]
    with tempfile.TemporaryDirectory(prefix="starfish-speculative-") as folder:
        model = Path(folder) / "model"
        guesses = Guesses(args.guesses)
        create_seeded_checkpoint(model, family="glm4_moe", guesses=guesses, **CHANGES)
        asyncio.run(run(model, args.ranks, concurrencies, args.rounds, Console()))


if __name__ == "__main__":
    main()
