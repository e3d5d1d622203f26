"""`starfish status`: the instance at one moment, for people and for machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from cli.observe.expert_status import expert_status, render_experts
from cli.observe.instance_view import InstanceView
from cli.observe.release_status import releases_of
from cli.run_dir import Target
from control_plane.placement import advise, compute_fault_tolerance, describe
from shared.change_progress import is_in_progress
from shared.clock import Clock
from shared.desired_state import Drain
from shared.errors import ConfigError
from shared.etcd_health import describe_alarm
from shared.etcd_store import connect_store
from shared.keys import Keys
from shared.rank_query import query_expert_counts, query_ranks
from shared.records import RankRecord
from shared.stragglers import lateness_ms, stragglers
from shared.types import EMPTY_SLOT, Member, NodeId, RankId
from shared.wire import StatusReply

STATE_STYLES = {
    "live": "green",
    "silent": "yellow",
    "draining": "yellow",
    "drained": "blue",
    "ready": "cyan",
    "starting": "cyan",
}


async def read_status(target: Target, clock: Clock, *, experts: bool = False) -> dict[str, Any]:
    """With an entry "experts" if they are asked for. Raises StoreUnavailable, or ConfigError if
    etcd has no such instance."""
    keys = Keys(target.instance)
    store = await connect_store(target.store)
    try:
        view = InstanceView.of(keys, (await store.get_prefix(keys.root)).values)
        etcd = await store.health()
    finally:
        await store.close()
    if view.spec is None and not view.ranks and not view.agents:
        raise ConfigError(
            f"etcd at {target.etcd} has no instance named {target.instance!r}; pass --instance"
        )
    num_ranks = view.spec.num_ranks if view.spec else 0
    wanted = view.desired.rank_ids(num_ranks)
    ranks = sorted({*wanted, *(record.rank for record in view.ranks)})
    records = {RankId(r): record for r in ranks if (record := view.record_of(r)) is not None}
    replies = await query_ranks(records.values(), target.access())
    status = status_of(target, view, [RankId(r) for r in ranks], records, replies, clock.wall())
    if experts:
        counts = await query_expert_counts(records.values(), target.access())
        status["experts"] = expert_status(view.expert_map, counts)
    return status | {"etcd_health": msgspec.to_builtins(etcd)}


def status_of(
    target: Target,
    view: InstanceView,
    ranks: list[RankId],
    records: Mapping[RankId, RankRecord],
    replies: Mapping[RankId, StatusReply | None],
    now: float,
) -> dict[str, Any]:
    """The JSON of `starfish status --json`. `now` is in Unix seconds."""
    spec = view.spec
    loads = {rank: reply.load for rank, reply in replies.items() if reply is not None}
    late, slow = lateness_ms(loads), stragglers(loads)
    seen = view.seen(lambda member: _sessions(replies.get(member.rank), member))
    steps = seen.steps(now)
    return {
        "instance": target.instance,
        "etcd": target.etcd,
        "model": spec.model_name if spec else None,
        "epoch": view.expert_map.epoch if view.expert_map else 0,
        "cause": view.expert_map.cause if view.expert_map else None,
        "leader": msgspec.to_builtins(view.leader),
        "verdicts_paused": view.desired.verdicts_paused,
        "change": {
            "number": view.desired.change,
            "in_progress": is_in_progress(steps),
            "steps": msgspec.to_builtins(steps),
        },
        "ranks": [
            rank_status(view, r, records.get(r), replies.get(r))
            | {"late_ms": late.get(r), "straggles": r in slow}
            for r in ranks
        ],
        "survives": _survives(view),
        "gateways": [msgspec.to_builtins(g) for g in view.gateways],
        "agents": [msgspec.to_builtins(a) for a in view.agents],
        "releases": releases_of(view),
    }


def rank_status(
    view: InstanceView, rank: RankId, record: RankRecord | None, reply: StatusReply | None
) -> dict[str, Any]:
    drain = view.desired.drain_of(rank)
    planned = {
        "drain": msgspec.to_builtins(drain),
        "safe_to_terminate": view.seen(lambda member: None).is_safe_to_terminate(rank),
    }
    if record is None:
        state = "dead" if drain is None else "drained"
        return {"rank": rank, "state": state, "pid": None, "incarnation": None, **planned}
    in_map = view.expert_map is not None and view.expert_map.has(record.member)
    status: dict[str, Any] = {
        "rank": rank,
        "state": "refused"
        if not in_map and is_refused(view, record)
        else _state(record, in_map, drain, reply),
        "pid": record.pid,
        "incarnation": record.incarnation,
        "release": msgspec.to_builtins(record.release),
        "node": record.node,
        "address": f"{record.control_host}:{record.control_port}",
        "transfer": record.transfer_name,
        "exchange": record.exchange,
        "slots": record.slots,
        "slots_filled": _filled(view, rank) if in_map else 0,
        "links": [str(member) for member in record.links],
        "started_at": record.started_at,
        "answers": reply is not None,
        **planned,
    }
    if reply is not None:
        load = reply.load
        status |= {
            "memory_links": [str(member) for member in reply.memory_links],
            "epoch": reply.epoch,
            "step": reply.step,
            "running": load.running,
            "waiting": load.waiting,
            "tokens": load.tokens,
            "kv_blocks": load.kv_blocks,
            "kv_blocks_used": load.kv_blocks - load.kv_blocks_free,
            "kv_blocks_cached": load.kv_blocks_cached,
            "kv_replicas_rejected": load.kv_replicas_rejected,
            "prefix_tokens": load.prefix_tokens,
            "prefix_tokens_cached": load.prefix_tokens_cached,
            "engine_age_ms": reply.engine_age_ms,
            "steps_committed": reply.steps_committed,
            "steps_abandoned": reply.steps_abandoned,
            "tokens_generated": reply.tokens_generated,
            "tokens_drafted": reply.tokens_drafted,
            "drafts_accepted": reply.drafts_accepted,
        }
    return status


def render_status(status: dict[str, Any], console: Console) -> None:
    leader = status["leader"]
    console.print(
        f"[bold]{status['instance']}[/]  model {status['model']}  epoch {status['epoch']}"
        + (f" ({status['cause']})" if status["cause"] else "")
    )
    console.print(
        f"leader {leader['control_plane']} (pid {leader['pid']}, term {leader['term']})"
        if leader
        else "[yellow]no leader: serving goes on, deaths are not noticed[/]"
    )
    if status["verdicts_paused"]:
        console.print("[yellow]verdicts are paused[/]: `starfish resume` ends that")
    for step in status["change"]["steps"]:
        console.print(f"[cyan]under way[/]  {step['text']}")
    safe = [str(rank["rank"]) for rank in status["ranks"] if rank["safe_to_terminate"]]
    if safe:
        console.print(f"[blue]safe to terminate[/]  rank {', '.join(safe)}")
    for kind in status.get("etcd_health", {}).get("alarms", ()):
        console.print(f"[red]{kind}: {describe_alarm(kind)}[/]")
    if len(status["releases"]) > 1:
        for release, names in status["releases"].items():
            console.print(f"[cyan]{release}[/]  {', '.join(names)}")
    for gateway in status["gateways"]:
        url = f"{gateway['scheme']}://{gateway['host']}:{gateway['port']}"
        alone = f", alone at port {gateway['own_port']}" if gateway["own_port"] else ""
        console.print(f"gateway {url} (pid {gateway['pid']}{alone})")
    console.print(_table(status["ranks"]))
    if status["survives"]:
        console.print(status["survives"]["summary"])
    if "experts" in status:
        render_experts(status["experts"], console)


def _table(ranks: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in (
        *("rank", "state", "incarnation", "pid", "address"),
        *("run", "wait", "KV", "reused", "slots", "links", "steps"),
    ):
        table.add_column(name, justify="left" if name in ("state", "address") else "right")
    for rank in ranks:
        style = STATE_STYLES.get(rank["state"], "red")
        kv = f"{rank['kv_blocks_used']}/{rank['kv_blocks']}" if rank.get("answers") else "–"
        slots = f"{rank['slots_filled']}/{rank['slots']}" if "slots" in rank else "–"
        cells = [rank.get(k) for k in ("incarnation", "pid", "address", "running", "waiting")]
        table.add_row(
            str(rank["rank"]),
            f"[{style}]{rank['state']}[/]" + (" (slow)" if rank.get("straggles") else ""),
            *("–" if cell is None else str(cell) for cell in cells),
            kv,
            _reused(rank),
            slots,
            describe_links(rank),
            str(rank.get("steps_committed", "–")),
        )
    return table


def describe_links(rank: dict[str, Any]) -> str:
    """How many links are open; through shared memory and over the network."""
    if "memory_links" not in rank:
        return "–"
    memory = len(set(rank["memory_links"]) & set(rank["links"]))
    network = len(rank["links"]) - memory
    parts = [(memory, "memory"), (network, "network")]
    return ", ".join(f"{count} {name}" for count, name in parts if count) or "0"


def _reused(rank: dict[str, Any]) -> str:
    """The fraction of all prompt tokens that were in the prefix cache."""
    if not rank.get("prefix_tokens"):
        return "–"
    return f"{rank['prefix_tokens_cached'] / rank['prefix_tokens']:.0%}"


def _state(record: RankRecord, in_map: bool, drain: Drain | None, reply: StatusReply | None) -> str:
    """For a member of the map: "live" or "draining" if it answers, else "silent"."""
    if not in_map:
        return record.state.value if drain is None else "drained"
    if reply is None:
        return "silent"
    return "live" if drain is None else "draining"


def is_refused(view: InstanceView, record: RankRecord) -> bool:
    """The leader can have no rank of this release."""
    leader = view.leader
    return leader is not None and not leader.release.speaks_with(record.release)


def _sessions(reply: StatusReply | None, member: Member) -> int | None:
    if reply is None or reply.incarnation != member.incarnation:
        return None
    return reply.load.running + reply.load.waiting


def _filled(view: InstanceView, rank: RankId) -> int:
    """Filled slots of the layer in which most slots are filled."""
    assert view.expert_map is not None
    held = view.expert_map.placement[:, rank] > EMPTY_SLOT
    return int(held.sum(axis=1).max(initial=0))


def _survives(view: InstanceView) -> dict[str, int | str] | None:
    if view.expert_map is None:
        return None
    nodes = {r.rank: r.node for r in view.ranks if view.expert_map.has(r.member)}
    for member in view.expert_map.members:  # a member whose lease has just ended still counts
        nodes.setdefault(member.rank, NodeId("unknown"))
    found = compute_fault_tolerance(view.expert_map, nodes)
    return {
        "rank_failures": found.rank_failures,
        "node_failures": found.node_failures,
        "rank_failures_with_reload": found.rank_failures_with_reload,
        "node_failures_with_reload": found.node_failures_with_reload,
        "summary": describe(found, advise(view.expert_map, nodes)),
    }
