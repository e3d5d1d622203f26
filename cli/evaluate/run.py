"""An evaluation: an undisturbed pass, a pass with a rank killed in the middle, and the loss if the
dead rank's experts were dropped."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cli.bench.fault_observer import FaultObserver
from cli.evaluate.documents import Document
from cli.evaluate.dropped import score_without_rank
from cli.evaluate.scoring import Score, Scorer, open_scorer
from cli.run_dir import Target
from shared.errors import ConfigError, Unavailable
from shared.rank_signal import send_to_rank
from shared.records import RankRecord

_COMPLETE_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalPlan:
    """`kill`: a second pass with a rank killed in the middle. `drop`: a third, in one process, in
    which that rank's experts are missing."""

    documents: Sequence[Document]
    model: Path
    concurrency: int
    kill: bool
    drop: bool
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    num_documents: int
    num_tokens: int
    num_bytes: int
    bits_per_byte: float
    perplexity: float
    killed_rank: int | None = None
    bits_per_byte_killed: float | None = None
    same_to_the_bit: bool | None = None  # every document's sum, not only the total
    bits_per_byte_dropped: float | None = None


async def evaluate(target: Target, plan: EvalPlan, console: Console) -> EvalReport:
    """Raises Unavailable, ConfigError."""
    if target.url is None:
        raise Unavailable("which gateway? pass --url, or the --run-dir of `starfish up`")
    async with open_scorer(target.url) as scorer:
        undisturbed = await _pass(scorer, plan, console, "undisturbed", lambda done: None)
        if not plan.kill:
            return _report(plan, undisturbed)
        async with FaultObserver.watching(target) as observer:
            await observer.wait_until_all_ranks_in_map(_COMPLETE_TIMEOUT_S)
            victim = random.Random(plan.seed).choice(observer.members())
            trigger = _KillTrigger(victim, after=len(plan.documents) // 3)
            label = f"rank {victim.rank} killed"
            killed = await _pass(scorer, plan, console, label, trigger)
            num_ranks = len(observer.members())
    dropped = None
    if plan.drop:
        console.print(f"without the experts of rank {victim.rank}, in one process …")
        dropped = await score_without_rank(
            plan.model, plan.documents, dead_rank=victim.rank, num_ranks=num_ranks
        )
    return _report(plan, undisturbed, victim, killed, dropped)


class _KillTrigger:
    """Sends SIGKILL once, as soon as `after` documents are done."""

    def __init__(self, victim: RankRecord, *, after: int) -> None:
        self._victim = victim
        self._after = after
        self._fired = False

    def __call__(self, done: int) -> None:
        if done >= self._after and not self._fired:
            self._fired = True
            send_to_rank(self._victim, signal.SIGKILL)


async def _pass(
    scorer: Scorer,
    plan: EvalPlan,
    console: Console,
    label: str,
    on_progress: Callable[[int], None],
) -> Score:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=len(plan.documents))

        def tell(done: int) -> None:
            progress.update(task, completed=done)
            on_progress(done)

        return await scorer.score(plan.documents, concurrency=plan.concurrency, on_progress=tell)


def _report(
    plan: EvalPlan,
    undisturbed: Score,
    victim: RankRecord | None = None,
    killed: Score | None = None,
    dropped: Score | None = None,
) -> EvalReport:
    return EvalReport(
        num_documents=len(plan.documents),
        num_tokens=undisturbed.num_tokens,
        num_bytes=undisturbed.num_bytes,
        bits_per_byte=undisturbed.bits_per_byte,
        perplexity=undisturbed.perplexity,
        killed_rank=None if victim is None else int(victim.rank),
        bits_per_byte_killed=None if killed is None else killed.bits_per_byte,
        same_to_the_bit=None if killed is None else killed.nats == undisturbed.nats,
        bits_per_byte_dropped=None if dropped is None else dropped.bits_per_byte,
    )


def print_report(report: EvalReport, console: Console) -> None:
    """Prints seventeen digits, so that a difference in the last bit shows."""

    def line(name: str, value: float | None, note: str = "") -> None:
        if value is not None:
            console.print(f"{name:38} {value:.17g}{note}", highlight=False)

    console.print(
        f"{report.num_documents} documents, {report.num_tokens} tokens, {report.num_bytes} bytes; "
        f"perplexity {report.perplexity:.3f} per token",
        highlight=False,
    )
    line("bits per byte", report.bits_per_byte)
    if report.killed_rank is not None:
        verdict = "the same to the bit" if report.same_to_the_bit else "DIFFERENT"
        line(
            f"… rank {report.killed_rank} killed in the middle",
            report.bits_per_byte_killed,
            f"  ({verdict})",
        )
    if report.bits_per_byte_dropped is not None:
        loss = report.bits_per_byte_dropped / report.bits_per_byte - 1
        line(
            "… had its experts been dropped instead",
            report.bits_per_byte_dropped,
            f"  ({loss:+.1%})",
        )


def held_out_path(model: Path, documents: Path | None, name: str) -> Path:
    """Raises ConfigError if the file does not exist."""
    path = documents or model / name
    if not path.exists():
        raise ConfigError(f"{path} does not exist; pass --documents FILE (JSON lines with `text`)")
    return path
