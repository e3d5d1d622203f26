"""Expert parallelism on CUDA through deaths: real rank processes over Mooncake's EP Buffer, exact
dispatch and combine, and the experiment of killing 1 … 16 of 32 ranks. Several ranks share a card
under CUDA MPS. Prints a table last; `--out` gets the JSON.

    python -m bench.gpu_ep micro  --ranks 2
    python -m bench.gpu_ep faults --ranks 2 --faults KILL:1 STOP:1
    python -m bench.gpu_ep faults --ranks 32 --mps --experts 32 --redundant 32 --tokens 8 \\
        --host-copy --faults KILL:1 KILL:2 KILL:4 STOP:1 KILL:8 KILL:16

A rank that waits holds one SM for every 8 slots of the instance, because Mooncake's kernels must
be resident as a whole: on a card with 132 SMs, ranks of the card x slots must stay below 1,056.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.gpu_ep_control import Control
from bench.gpu_ep_model import StepShape
from bench.gpu_ep_rank import RankArguments
from shared.embedded_etcd import embedded_etcd
from shared.etcd_store import connect_store

_SEGMENTS = 5


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("micro", "faults"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mps", action="store_true", help="several ranks share a card")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--redundant", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32, help="of a rank in a step")
    parser.add_argument("--step-timeout-ms", type=int, default=5000)
    parser.add_argument(
        "--faults",
        nargs="*",
        default=[],
        metavar="SIGNAL:RANKS",
        help="KILL or STOP so many ranks at once; between two faults they rejoin",
    )
    parser.add_argument(
        "--early",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="judge who has begun to die, not only who is gone",
    )
    parser.add_argument("--host-copy", action="store_true", help="load orphans from host memory")
    parser.add_argument("--segment-steps", type=int, default=100)
    parser.add_argument("--settle-s", type=float, default=2.0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


@contextmanager
def multi_process_service(folder: Path) -> Iterator[None]:
    """CUDA MPS for the processes that are spawned inside."""
    for name in ("PIPE", "LOG"):
        os.environ[f"CUDA_MPS_{name}_DIRECTORY"] = str(folder / f"mps-{name.lower()}")
        (folder / f"mps-{name.lower()}").mkdir()
    subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True)
    try:
        yield
    finally:
        subprocess.run(["nvidia-cuda-mps-control"], input="quit -t 5\n", text=True, timeout=30)
        log = folder / "mps-log" / "server.log"
        if log.exists():
            print("MPS server:", *log.read_text().splitlines()[-6:], sep="\n  ")


def cards() -> list[str]:
    """Without a CUDA context of our own, which would be one more client of the cards."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def arguments_of(args: argparse.Namespace, endpoint: str, folder: Path) -> RankArguments:
    return RankArguments(
        rank=0,
        incarnation=0,
        num_ranks=args.ranks,
        slots=-(-(args.experts + args.redundant) // args.ranks),
        gpus=len(cards()),
        shape=StepShape(
            layers=args.layers if args.what == "faults" else 1,
            hidden=args.hidden,
            experts=args.experts,
            redundant=args.redundant,
            top_k=args.top_k,
            intermediate=args.intermediate if args.what == "faults" else 16,
            tokens=args.tokens,
            period=64,
        ),
        endpoint=endpoint,
        instance=f"gpu-ep-{os.getpid()}",
        folder=str(folder),
        step_timeout_ms=args.step_timeout_ms,
        host_copy=args.host_copy and args.what == "faults",
        blocking_sync=args.mps,
    )


async def micro(control: Control) -> dict[str, Any]:
    ranks = list(range(control.base.num_ranks))
    await control.form([])
    await control.hear(ranks, "entered")
    control.tell(ranks, "go", [])
    answers = await control.hear(ranks, "stopped")
    kinds = ("bf16", "fp8")
    return {
        kind: {
            "exact": all(a[kind]["exact"] for a in answers),
            "relative_error": max(a[kind]["relative_error"] for a in answers),
            "pair_us": max(a[kind]["pair_us"] for a in answers),
        }
        for kind in kinds
    }


async def faults(control: Control, args: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    ranks = list(range(args.ranks))
    schedule = [(k, args.segment_steps) for _ in range(_SEGMENTS) for k in ("elastic", "static")]
    ready = await control.form(schedule)
    control.watch_stops()
    watcher = asyncio.create_task(control.watch_dying())
    result: dict[str, Any] = {"formed_s": time.monotonic() - began, "ready": ready[0]}
    spent: dict[str, list[float]] = {"elastic": [], "static": []}
    for _ in schedule:
        for kind, _, seconds in (await control.hear(ranks, "segment"))[:1]:
            spent[kind].append(seconds)
    result["segments"] = {
        kind: {
            "step_ms": sorted(seconds)[len(seconds) // 2] / args.segment_steps * 1e3,
            "step_ms_each": [s / args.segment_steps * 1e3 for s in seconds],
        }
        for kind, seconds in spent.items()
    }
    await control.until_committed(2 * control.base.shape.period)
    await asyncio.sleep(1.0)
    result["faults"] = []
    print("formed", json.dumps(result)[:1500], flush=True)
    for index, fault in enumerate(args.faults):
        name, _, count = fault.partition(":")
        victims = control.members()[-int(count) :]  # they sit on all cards alike
        struck = await control.strike(victims, signal.Signals[f"SIG{name}"], args.settle_s)
        entry: dict[str, Any] = {"signal": f"SIG{name}"} | struck
        result["faults"].append(entry)
        print(json.dumps(entry), flush=True)
        if index + 1 < len(args.faults):
            entry["rejoin"] = await control.rejoin(victims, args.settle_s)
            print(json.dumps(entry["rejoin"]), flush=True)
            await asyncio.sleep(0.8)
    await control.stop()
    watcher.cancel()
    steps, wrong = control.wrong_steps()
    return result | {"committed_steps": steps, "wrong_steps": wrong}


def table(result: dict[str, Any]) -> str:
    lines = []
    if "segments" in result:
        on, off = (result["segments"][k]["step_ms"] for k in ("elastic", "static"))
        lines += [f"step: elastic {on:.3f} ms, static {off:.3f} ms, {100 * (on / off - 1):+.2f} %"]
        lines += [f"committed {result['committed_steps']}, wrong {result['wrong_steps']}"]
    for fault in result.get("faults", ()):
        lines.append(
            f"{fault['signal']} {fault['victims']:2d}: gap p50 {fault['gap_ms_p50']:.0f} max "
            f"{fault['gap_ms_max']:.0f} ms (usual {fault['usual_gap_ms']:.1f}), 95 % after "
            f"{fault['recovered_ms']:.0f} ms, {fault['tokens_per_s_before']:.0f} -> "
            f"{fault['tokens_per_s_after']:.0f} tok/s"
        )
        if join := fault.get("rejoin"):
            lines.append(
                f"   rejoin {join['joined']}: ready {join['ready_s']:.1f} s, connect "
                f"{join['connect_ms_max']:.0f} ms, gap p50 {join['gap_ms_p50']:.0f} max "
                f"{join['gap_ms_max']:.0f} ms, {join['tokens_per_s_after']:.0f} tok/s"
            )
    for kind in ("bf16", "fp8"):
        if kind in result:
            lines.append(f"{kind}: {result[kind]}")
    return "\n".join(lines)


async def run(args: argparse.Namespace) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="starfish-ep-", dir="/dev/shm"))
    try:
        async with embedded_etcd(folder / "etcd") as etcd:
            store = await connect_store([etcd.endpoint], timeout_s=10)
            base = arguments_of(args, etcd.endpoint, folder)
            if args.what == "micro":
                from bench.gpu_ep_micro import main as prober

                control = Control(store, base, prober)
            else:
                control = Control(store, base, early=args.early)
            result: dict[str, Any] = {"cards": cards()}
            try:
                if args.what == "micro":
                    result |= await micro(control)
                else:
                    result |= await faults(control, args)
            finally:
                control.kill_all()
                await store.close()
            return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as scratch:
        if args.mps:
            with multi_process_service(Path(scratch)):
                result = asyncio.run(run(args))
        else:
            result = asyncio.run(run(args))
    result["arguments"] = {k: str(v) for k, v in vars(args).items()}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    print(f"{args.what}, {args.ranks} ranks on {', '.join(result['cards'])}")
    print(table(result))


if __name__ == "__main__":
    main()
