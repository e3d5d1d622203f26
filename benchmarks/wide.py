"""The published experiment on elastic expert parallelism, at the width that a machine allows:
deaths under load with one rank a card, the same with four ranks a card, what elasticity costs in
peace, and how tokens/s grow with the cards. Each part is one call of at most ten minutes, which
runs `benchmarks.gpu_serve` and `benchmarks.gpu_server`; its results and logs go to --out.

    python -m benchmarks.wide deaths --cards 8 --out out
    python -m benchmarks.wide shared-cards --cards 8 --out out
    python -m benchmarks.wide overhead --cards 8 --out out
    python -m benchmarks.wide growth --cards 8 --out out
    python -m benchmarks.wide report --out out > tables.md

`report` prints tables of what is there, and draws growth.png into --out. With `--device cpu` a part
runs with the reference size on CPU ranks, --cards of them: a rehearsal.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.wide_report import save_picture, tables

_PART_S = 600.0
_END_S = 30.0
"""What a run needs to stop its instance and to remove its checkpoint."""

V32_SHAPE = {
    "hidden_size": 7168,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "intermediate_size": 18_432,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "vocab_size": 129_280,
}
"""DeepSeek-V3.2 but for layers and the experts' inner size, which --layers and --inner-size say."""

_TWELVE = (
    *("KILL:1", "STOP:1", "KILL:2", "KILL:1", "KILL:3", "PAUSE:1"),
    *("KILL:1", "KILL:4", "KILL:1", "STOP:1", "KILL:2", "KILL:1"),
)
_HALVES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a benchmark. `name` is that of its files in --out."""

    name: str
    module: str
    arguments: tuple[str, ...]

    def command(self, out: Path) -> list[str]:
        return [
            *(sys.executable, "-m", self.module, *self.arguments),
            *("--logs", str(out / f"{self.name}.logs"), "--out", str(out / f"{self.name}.json")),
        ]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("deaths", "shared-cards", "overhead", "growth", "report"))
    parser.add_argument("--cards", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--layers", type=int, default=8, help="of V3.2's shape")
    parser.add_argument("--inner-size", type=int, default=512, help="of each expert")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2, help="of each kind in `overhead`")
    parser.add_argument(
        "--seeded-dir",
        type=Path,
        default=Path("/dev/shm/starfish-wide"),
        help="folder of the random checkpoints, gone at the end (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results and logs")
    args = parser.parse_args(argv)
    if args.cards < 2 or min(args.layers, args.inner_size, args.streams, args.rounds) < 1:
        parser.error("--cards is at least 2, the others at least 1")
    return args


def runs_of(args: argparse.Namespace) -> Iterator[Run]:
    """The runs of a part, in order."""
    match args.part:
        case "deaths":
            faults = [text for text in _TWELVE if _count(text) < args.cards]
            yield _deaths("deaths", args, args.cards, faults)
        case "shared-cards":
            ranks = 4 * args.cards
            faults = [f"KILL:{count}" for count in _HALVES if count <= ranks // 2]
            yield _deaths("shared-cards", args, ranks, faults, "--no-cuda-mps")
        case "overhead":
            kinds = {
                "elastic": (),
                "static": ("--static",),
                "one-replica": ("--redundant-experts", "0"),
            }
            for index in range(args.rounds):
                for kind, flags in kinds.items():
                    name = f"overhead-{kind}-{index}"
                    yield _rates(name, args, [args.cards], "qwen3-30b", [1, 8, 32, 128], *flags)
        case "growth":
            widths = [width for width in (1, 2, 4, 8, 16) if width <= args.cards]
            yield _rates("growth-qwen3-30b", args, widths, "qwen3-30b", [1, 32, 128])
            yield _rates("growth-qwen3-235b", args, [args.cards], "qwen3-235b", [1, 32, 128])
            prompt_tokens = "4096" if args.device == "cuda" else "64"
            prefill = ("--prompt-tokens", prompt_tokens, "--new-tokens", "16")
            yield _rates("prefill-qwen3-30b", args, [args.cards], "qwen3-30b", [1], *prefill)
            yield _rates("prefill-qwen3-235b", args, [args.cards], "qwen3-235b", [1], *prefill)


def _count(fault: str) -> int:
    return int(fault.partition(":")[2])


def _deaths(name: str, args: argparse.Namespace, ranks: int, faults: list[str], *flags: str) -> Run:
    model: tuple[str, ...] = ()
    if args.device == "cuda":
        shape = V32_SHAPE | {
            "num_hidden_layers": args.layers,
            "moe_intermediate_size": args.inner_size,
        }
        model = (
            *("--family", "deepseek_v32", "--redundant-experts", "256"),
            *("--seeded-dir", str(args.seeded_dir / "v32"), "--config", *_entries(shape)),
            *flags,
        )
    return Run(
        name=name,
        module="benchmarks.gpu_serve",
        arguments=(
            *("--device", args.device, "--ranks", str(ranks), "--streams", str(args.streams)),
            *("--faults", *faults, "--limit-s", str(_PART_S * 0.6), "--rejoin-timeout-s", "60"),
            *model,
        ),
    )


def _rates(
    name: str,
    args: argparse.Namespace,
    ranks: list[int],
    shape: str,
    batches: list[int],
    *flags: str,
) -> Run:
    on_cards = args.device == "cuda"
    return Run(
        name=name,
        module="benchmarks.gpu_server",
        arguments=(
            *("--device", args.device, "--ranks", *map(str, ranks)),
            *("--shape", shape if on_cards else "reference"),
            *("--batches", *map(str, batches if on_cards else batches[:2])),
            *("--seeded-dir", str(args.seeded_dir / shape), "--keep", "--rounds", "1"),
            *flags,
        ),
    )


def _entries(shape: Mapping[str, int]) -> list[str]:
    return [f"{name}={value}" for name, value in shape.items()]


def run_part(args: argparse.Namespace) -> int:
    """Returns the number of runs that failed or found no time."""
    args.out.mkdir(parents=True, exist_ok=True)
    ends_at = time.monotonic() + _PART_S - _END_S
    failed = 0
    for run in runs_of(args):
        left_s = ends_at - time.monotonic()
        if left_s <= 0.0:
            print(f"wide: no time left for {run.name}", flush=True)
            failed += 1
            continue
        print(f"wide: {run.name}, {left_s:.0f} s left", flush=True)
        failed += _run_within(run.command(args.out), left_s) != 0
    return failed


def _run_within(command: list[str], seconds: float) -> int:
    """The exit code. A run that takes longer is asked to stop as by Ctrl-C, and keeps what it has
    written."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            return process.wait()


def main() -> int:
    args = parse()
    if args.part == "report":
        print(tables(args.out))
        save_picture(args.out, args.out / "growth.png")
        return 0
    if args.seeded_dir.exists():
        print(f"wide: {args.seeded_dir} is there already: remove it, or say --seeded-dir")
        return 1
    try:
        return 1 if run_part(args) else 0
    finally:
        shutil.rmtree(args.seeded_dir, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
