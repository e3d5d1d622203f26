"""`python -m docs.protocol`: explores every state that the model reaches, under each kind of
fault, and says what it has found."""

from __future__ import annotations

import argparse
import sys
import time

from docs.protocol.explorations import EXPLORATIONS, Exploration
from docs.protocol.explore import explore


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.protocol", description=__doc__)
    parser.add_argument("--short", action="store_true", help="leave out those that take minutes")
    parser.add_argument("--states-max", type=int, default=3_000_000, help="of one exploration")
    parser.add_argument("--traces", action="store_true", help="print the way to each problem")
    flags = parser.parse_args()
    chosen = [each for each in EXPLORATIONS if not (flags.short and each.is_long)]
    results = [_run(each, flags.states_max, traces=flags.traces) for each in chosen]
    return 0 if all(results) else 1


def _run(exploration: Exploration, states_max: int, *, traces: bool) -> bool:
    """Whether it found what it should."""
    began = told = time.monotonic()

    def on_progress(num_states: int, depth: int) -> None:
        nonlocal told
        if time.monotonic() - told > 5:
            told = time.monotonic()
            print(f"  … {num_states:,} states, depth {depth}", file=sys.stderr, flush=True)

    found = explore(
        exploration.rules, exploration.budget, states_max=states_max, on_progress=on_progress
    )
    is_expected = found.problem.startswith(exploration.problem) and bool(found.problem) == bool(
        exploration.problem
    )
    extent = "all" if found.is_whole else "the first"
    print(
        f"{'ok    ' if is_expected else 'WRONG '} {exploration.name}: {extent} "
        f"{found.num_states:,} states to depth {found.depth}, "
        f"{found.problem or 'no invariant broken'} ({time.monotonic() - began:.0f} s)",
        flush=True,
    )
    if traces or not is_expected:
        print("".join(f"    {label}\n" for label in found.trace), end="")
    return is_expected


if __name__ == "__main__":
    sys.exit(main())
