"""Programs that work on a model's files, outside of any rank. Ranks that start together rely on the
results, so that each of them does not repeat the work.

    python -m gpu_worker.model_tools warm-up              compile the CPU kernels to numba's cache
    python -m gpu_worker.model_tools seed --out FOLDER    write a checkpoint of random weights
    python -m gpu_worker.model_tools score FOLDER TOKENS  print the scores of given tokens
    python -m gpu_worker.model_tools manifest FOLDER      write the hashes of a checkpoint's tensors
    python -m gpu_worker.model_tools verify FOLDER        check the files against their hashes

`score` prints a JSON list: for each list of tokens the sum of its negative log-likelihoods, in
nats. The others print progress as lines `done/total`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu_worker.model_tools.seeded_configs import DEFAULT_FAMILY, SEEDED_CONFIGS
from gpu_worker.model_tools.seeded_drafts import Guesses
from shared.errors import StarfishError
from shared.model_spec import read_model_spec

_SEED_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float4_e2m1fn_x2")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gpu_worker.model_tools",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("warm-up", help="compile the CPU kernels to numba's cache")
    seed = commands.add_parser("seed", help="write a checkpoint of random weights")
    seed.add_argument("--out", type=Path, required=True, help="the folder to create")
    seed.add_argument("--family", choices=sorted(SEEDED_CONFIGS), default=DEFAULT_FAMILY)
    seed.add_argument("--dtype", choices=_SEED_DTYPES, default="float32")
    seed.add_argument("--seed", type=int, default=0)
    seed.add_argument(
        "--guesses",
        choices=[guesses.value for guesses in Guesses],
        help="add a layer of multi-token prediction whose guesses are random, or a decoder that is "
        "easy to guess with a layer that does (deepseek_v3, deepseek_v32, glm4_moe)",
    )
    score = commands.add_parser("score", help="print negative log-likelihoods of given tokens")
    score.add_argument("folder", type=Path)
    score.add_argument("tokens", type=Path, help="a JSON list of lists of token ids")
    score.add_argument(
        "--num-ranks", type=int, default=1, help="over which the experts are divided evenly"
    )
    score.add_argument("--without-rank", type=int, help="a rank whose experts contribute nothing")
    for name, what in (
        ("manifest", "write the hash manifest of a checkpoint"),
        ("verify", "check a checkpoint against its hash manifest"),
    ):
        commands.add_parser(name, help=what).add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "warm-up":
            _warm_up()
        elif options.command in ("manifest", "verify"):
            _hash(options.folder, write=options.command == "manifest")
        elif options.command == "score":
            _score(options.folder, options.tokens, options.num_ranks, options.without_rank)
        else:
            guesses = None if options.guesses is None else Guesses(options.guesses)
            _seed(options.out, options.family, options.dtype, options.seed, guesses)
    except (StarfishError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _warm_up() -> None:
    from gpu_worker.cpu.registry import warm_up  # numba is slow to import

    warm_up(_print_progress)


def _seed(folder: Path, family: str, dtype: str, seed: int, guesses: Guesses | None) -> None:
    import torch

    from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint

    create_seeded_checkpoint(
        folder,
        seed,
        _print_progress,
        family=family,
        dtype=getattr(torch, dtype),
        guesses=guesses,
    )


def _score(folder: Path, tokens: Path, num_ranks: int, without_rank: int | None) -> None:
    from gpu_worker.model_tools.scoring import LocalScorer, experts_of_rank

    documents = json.loads(tokens.read_text())
    num_experts = read_model_spec(folder).num_experts
    missing = () if without_rank is None else experts_of_rank(without_rank, num_ranks, num_experts)
    scorer = LocalScorer(folder, missing=missing)
    print(json.dumps([scorer.nats(document) for document in documents]))


def _hash(folder: Path, *, write: bool) -> None:
    from gpu_worker.checkpoint.manifest import verify_folder, write_manifest

    (write_manifest if write else verify_folder)(folder, _print_progress)


def _print_progress(done: int, total: int) -> None:
    if done * 100 // total != (done - 1) * 100 // total:
        print(f"{done}/{total}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
