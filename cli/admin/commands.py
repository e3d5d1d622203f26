"""The commands that change a running instance. Each waits until the change is done, unless it is
told not to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.admin.answers import RankStatus
from cli.admin.goals import (
    Goal,
    drained,
    rebalanced,
    replaced,
    restart_stopped,
    restarted,
    scaled,
    serving,
    verdicts,
)
from cli.flags import flags_from_dataclasses
from cli.outcome import run_command
from cli.run_dir import Target
from cli.target_flags import JsonFlag, TargetFlags
from shared.clock import SystemClock
from shared.desired_state import GRACE_S_MAX, NODE_CHARACTERS_MAX, RANKS_MAX
from shared.etcd_options import EtcdOptions

GraceFlag = Annotated[
    float,
    typer.Option(
        "--grace",
        min=0.0,
        max=GRACE_S_MAX,
        help="Seconds in which sessions may finish where they are; then they move on.",
    ),
]
RankOrNode = Annotated[
    str, typer.Argument(metavar="RANK|NODE", help="Number of a rank, or name of a node.")
]
_GRACE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminFlags:
    """How the admin API is reached, and how its answer is waited for."""

    admin_url: Annotated[
        str | None,
        typer.Option(
            "--admin-url",
            envvar="STARFISH_ADMIN_URL",
            help="Address of the admin API (default: the leader's, by the run folder or etcd).",
        ),
    ] = None
    admin_token_file: Annotated[
        Path | None,
        typer.Option(
            "--admin-token-file",
            envvar="STARFISH_ADMIN_TOKEN_FILE",
            help="File with its token (default: the one in the run folder).",
        ),
    ] = None
    admin_ca: Annotated[
        Path | None,
        typer.Option(
            "--admin-ca",
            envvar="STARFISH_ADMIN_CA",
            help="PEM file with the authority of its certificate, if it has TLS (default: those "
            "of the system).",
        ),
    ] = None
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Return once the change is accepted.")
    ] = False
    timeout_s: Annotated[
        float,
        typer.Option(
            "--timeout",
            min=0.0,
            help="Seconds to wait for it; it goes on all the same. 0: no limit.",
        ),
    ] = 0.0

    def target(self, flags: TargetFlags) -> Target:
        """Raises ConfigError if there is no instance. Who names address and token needs no more."""
        if self.admin_url and self.admin_token_file:
            target = Target(store=EtcdOptions(), instance=flags.instance or "default")
        else:
            target = flags.target()
        return replace(
            target,
            admin_url=self.admin_url or target.admin_url,
            admin_token_file=self.admin_token_file or target.admin_token_file,
            admin_ca=self.admin_ca or target.admin_ca,
        )


def add_admin_commands(app: typer.Typer) -> None:
    for command in (scale, drain, undrain, replace_rank, restart, pause, resume, rebalance):
        app.command(name="replace" if command is replace_rank else None)(command)


@flags_from_dataclasses
def scale(
    target: TargetFlags,
    admin: AdminFlags,
    ranks: Annotated[
        int | None,
        typer.Argument(min=1, max=RANKS_MAX, help="How many ranks there shall be."),
    ] = None,
    add: Annotated[
        int | None, typer.Option(min=1, max=RANKS_MAX, help="So many more, instead.")
    ] = None,
    add_rank: Annotated[
        list[int] | None,
        typer.Option(
            min=0, max=RANKS_MAX - 1, help="A rank of this number more, instead; may be repeated."
        ),
    ] = None,
    remove: Annotated[
        list[int] | None,
        typer.Option(min=0, max=RANKS_MAX - 1, help="Without this rank, instead; may be repeated."),
    ] = None,
    node: Annotated[str, typer.Option(help="Node of the new ranks (default: the emptiest).")] = "",
    grace: GraceFlag = _GRACE_S,
    as_json: JsonFlag = False,
) -> None:
    """Have more or fewer ranks. Those that go are drained first; clients notice nothing.

    Ranks keep their numbers: the lowest free ones come, the highest go
    unless --add-rank or --remove names others. Refused if the ranks that
    stay could not hold every expert."""
    given = [ranks is not None, add is not None, bool(add_rank), bool(remove)]
    if sum(given) != 1:
        raise typer.BadParameter("pass one of: a number of ranks, --add, --add-rank, --remove")
    if node and remove:
        raise typer.BadParameter("--node is for ranks that come, not for --remove")
    fields: dict[str, Any] = {"grace_s": grace}
    if ranks is not None:
        fields["ranks"] = ranks
    if add is not None:
        fields["add"] = add
    if add_rank:
        fields["add_ranks"] = add_rank
    if remove:
        fields["remove"] = remove
    if node:
        fields["node"] = node
    goal = scaled(ranks, with_=add_rank or (), without=remove or ())
    _run(target, admin, as_json, "scale", fields, goal)


@flags_from_dataclasses
def drain(
    what: RankOrNode,
    target: TargetFlags,
    admin: AdminFlags,
    grace: GraceFlag = _GRACE_S,
    as_json: JsonFlag = False,
) -> None:
    """Take a rank, or all ranks of a node, out of service without a client's notice.

    It gets no new sessions; its own finish within --grace or move to other
    ranks, then it leaves the map. Its process stays, and serves again after
    `starfish undrain`. At the end it is safe to terminate it, or its host."""
    fields, name, select = _selected(what)
    goal = drained(select, name)
    _run(target, admin, as_json, "drain", {**fields, "grace_s": grace}, goal, f"undrain {what}")


@flags_from_dataclasses
def undrain(
    what: RankOrNode, target: TargetFlags, admin: AdminFlags, as_json: JsonFlag = False
) -> None:
    """Take a drained rank, or all ranks of a node, back into service."""
    fields, name, select = _selected(what)
    _run(target, admin, as_json, "undrain", fields, serving(select, name), f"drain {what}")


@flags_from_dataclasses
def replace_rank(
    rank: Annotated[int, typer.Argument(min=0, max=RANKS_MAX - 1, help="Number of the rank.")],
    target: TargetFlags,
    admin: AdminFlags,
    node: Annotated[str, typer.Option(help="Node on which it shall run.")],
    grace: GraceFlag = _GRACE_S,
    as_json: JsonFlag = False,
) -> None:
    """Move a rank to another node: it is drained where it is, and starts there."""
    fields = {"rank": rank, "node": node, "grace_s": grace}
    _run(target, admin, as_json, "replace", fields, replaced(rank, node))


@flags_from_dataclasses
def restart(
    target: TargetFlags,
    admin: AdminFlags,
    rolling: Annotated[
        bool, typer.Option("--rolling", help="One after the other: there is no other way.")
    ] = False,
    rank: Annotated[
        list[int] | None,
        typer.Option(min=0, max=RANKS_MAX - 1, help="Only this rank; may be repeated."),
    ] = None,
    stop: Annotated[
        bool, typer.Option("--stop", help="Stop a rolling restart after the rank it is at.")
    ] = False,
    grace: GraceFlag = _GRACE_S,
    as_json: JsonFlag = False,
) -> None:
    """Give every rank a new process, one after the other, as an upgrade needs it.

    Each is drained, restarted, and back in the map before the next one's turn."""
    if rolling is stop:
        raise typer.BadParameter("pass --rolling, or --stop")
    if stop and rank:
        raise typer.BadParameter("--stop ends the whole restart: leave --rank out")
    fields: dict[str, Any] = {"rolling": True, "grace_s": grace}
    if rank:
        fields["ranks"] = rank
    if stop:
        _run(target, admin, as_json, "restart", {"stop": True}, restart_stopped)
    else:
        _run(target, admin, as_json, "restart", fields, restarted(rank or ()), "restart --stop")


@flags_from_dataclasses
def pause(target: TargetFlags, admin: AdminFlags, as_json: JsonFlag = False) -> None:
    """Let no verdict end a rank that still runs, as before work on the network.

    Ranks whose processes end are replaced all the same. `starfish resume` ends the pause."""
    _run(target, admin, as_json, "pause", {}, verdicts(paused=True), "resume")


@flags_from_dataclasses
def resume(target: TargetFlags, admin: AdminFlags, as_json: JsonFlag = False) -> None:
    """End the pause of verdicts."""
    _run(target, admin, as_json, "resume", {}, verdicts(paused=False))


@flags_from_dataclasses
def rebalance(target: TargetFlags, admin: AdminFlags, as_json: JsonFlag = False) -> None:
    """Move experts to where they are worth most now, without waiting for a quiet time."""
    _run(target, admin, as_json, "rebalance", {}, rebalanced)


def _run(
    target: TargetFlags,
    admin: AdminFlags,
    as_json: bool,
    name: str,
    fields: Mapping[str, Any],
    goal: Goal,
    undo: str = "",
) -> None:
    from cli.admin.follow import Manner, Wish, carry_out

    async def work() -> int:
        wish = Wish(name=name, fields=fields, goal=goal, undo=f"starfish {undo}" if undo else "")
        manner = Manner(waits=not admin.no_wait, timeout_s=admin.timeout_s, as_json=as_json)
        return await carry_out(admin.target(target), wish, manner, SystemClock())

    run_command(work())


def _selected(what: str) -> tuple[dict[str, Any], str, Any]:
    """The request's fields, a name for people, and which ranks are meant."""
    if what.isdecimal():
        number = int(what)
        if number >= RANKS_MAX:
            raise typer.BadParameter(f"ranks are numbered 0 to {RANKS_MAX - 1}")
        return {"rank": number}, f"rank {number}", lambda rank: rank.rank == number
    if not what or what[0] == "-":
        raise typer.BadParameter("pass the number of a rank, or the name of a node")
    if len(what) > NODE_CHARACTERS_MAX:
        raise typer.BadParameter(f"the name of a node has {NODE_CHARACTERS_MAX} characters at most")
    return {"node": what}, f"node {what}", lambda rank: _is_on(rank, what)


def _is_on(rank: RankStatus, node: str) -> bool:
    return rank.node == node
