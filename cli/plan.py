"""`starfish plan`: what the planner would do with a cluster that need not exist. Places, then kills
each rank and node on paper; the planner itself is `control_plane.placement`."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cli.plan_picture import save_picture
from control_plane.placement import (
    advise,
    balance,
    compute_fault_tolerance,
    describe,
    place,
    shrink,
)
from shared.errors import ConfigError, StarfishError
from shared.expert_map import ExpertMap, Placement
from shared.model_spec import read_model_spec
from shared.types import Epoch, Incarnation, Member, NodeId, RankId

DEATHS_MAX = 64
WEIGHT_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "float8_e4m3fn": 1.0}


class Skew(Enum):
    """How uneven the generated loads are."""

    LOGNORMAL = "lognormal"
    ZIPF = "zipf"
    EVEN = "even"


class PlanSizes(NamedTuple):
    """What is planned for."""

    layers: int
    experts: int
    ranks: int
    nodes: int
    slots_per_rank: int
    redundant: int
    survive: int
    bytes_per_expert: int

    @property
    def node_of(self) -> dict[RankId, NodeId]:
        return {RankId(r): NodeId(f"node{r * self.nodes // self.ranks}") for r in range(self.ranks)}


def plan(
    experts: Annotated[int, typer.Option(min=1, help="Experts of a layer.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="MoE layers.")] = 61,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks.")] = 32,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes; ranks are dealt evenly.")] = 4,
    redundant: Annotated[
        int, typer.Option("--redundant", min=0, help="Slots filled beyond one for each expert.")
    ] = 256,
    slots: Annotated[
        int | None, typer.Option(min=0, help="Slots a rank owns (default: just enough).")
    ] = None,
    survive: Annotated[
        int, typer.Option(min=0, help="Rank failures to survive whatever that costs in balance.")
    ] = 0,
    loads: Annotated[
        Path | None, typer.Option(help="Loads, layers x experts: .npy, .json or .csv.")
    ] = None,
    skew: Annotated[Skew, typer.Option(help="Loads to generate without a file.")] = Skew.LOGNORMAL,
    skew_by: Annotated[float, typer.Option(min=0, help="Sigma, or Zipf's exponent.")] = 0.7,
    seed: Annotated[int, typer.Option(min=0, help="Of the generated loads.")] = 0,
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint folder; gives experts, layers and bytes.")
    ] = None,
    expert_mib: Annotated[
        float, typer.Option(min=0, help="MiB of one expert's weights, without --model.")
    ] = 42.0,
    png: Annotated[
        Path | None, typer.Option(help="Draw one layer before and after a death here.")
    ] = None,
    layer: Annotated[int, typer.Option(min=0, help="Layer to draw.")] = 0,
    death: Annotated[int, typer.Option(min=0, help="Rank whose death is drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, for machines.")] = False,
) -> None:
    """Show a placement, what it survives, and what each possible death would move."""
    try:
        bytes_per_expert = round(expert_mib * 2**20)
        if model is not None:
            layers, experts, bytes_per_expert = _from_model(model)
        weights = (
            _read_loads(loads) if loads else _generate_loads(skew, skew_by, seed, layers, experts)
        )
        layers, experts = weights.shape
        sizes = _sizes(layers, experts, ranks, nodes, slots, redundant, survive, bytes_per_expert)
        expert_map = _place_experts(weights, sizes)
        report = report_of(expert_map, weights, sizes)
        if png is not None:
            _draw_death(png, expert_map, weights, sizes, layer, death)
    except StarfishError as error:
        typer.echo(f"starfish: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(report))
    else:
        _print_report(report, Console())


def report_of(
    expert_map: ExpertMap, loads: NDArray[np.float64], sizes: PlanSizes
) -> dict[str, Any]:
    """Pure: the JSON of `starfish plan --json`."""
    node_of, ranks = sizes.node_of, sorted(sizes.node_of)
    tolerance, advice = compute_fault_tolerance(expert_map, node_of), advise(expert_map, node_of)
    peak = balance(expert_map.placement, loads, ranks)
    filled = (expert_map.placement >= 0).sum(axis=(0, 2))
    rank_deaths = ranks[:: -(-len(ranks) // DEATHS_MAX)]
    by_node = {name: [r for r in ranks if node_of[r] == name] for name in node_of.values()}
    names = list(by_node)
    return {
        **sizes._asdict(),
        "balance": {"mean": float(peak.mean()), "max": float(peak.max())},
        "left_in_host_memory": len(expert_map.uncovered()),
        "survives": {
            "rank_failures": tolerance.rank_failures,
            "node_failures": tolerance.node_failures,
            "rank_failures_with_reload": tolerance.rank_failures_with_reload,
            "node_failures_with_reload": tolerance.node_failures_with_reload,
            "experts_on_one_rank": len(tolerance.at_risk_of_rank),
            "experts_on_one_node": len(tolerance.at_risk_of_node),
        },
        "advice": [more._asdict() for more in advice],
        "summary": describe(tolerance, advice),
        "memory": {
            "bytes_per_expert": sizes.bytes_per_expert,
            "filled_bytes_per_rank_max": int(filled.max()) * sizes.bytes_per_expert,
            "slot_bytes_per_rank": sizes.layers * sizes.slots_per_rank * sizes.bytes_per_expert,
        },
        "rank_deaths": [
            {"rank": rank, **_death(expert_map, loads, sizes, [rank])} for rank in rank_deaths
        ],
        "node_deaths": [
            {"node": name, **_death(expert_map, loads, sizes, by_node[name])}
            for name in names[:: -(-len(names) // DEATHS_MAX)]
            if len(names) > 1
        ],
    }


def _death(
    expert_map: ExpertMap, loads: NDArray[np.float64], sizes: PlanSizes, dead: list[RankId]
) -> dict[str, Any]:
    """What it would mean for the survivors: replicas that give way, experts to load, balance."""
    alive = [r for r in sorted(sizes.node_of) if r not in set(dead)]
    if not alive:
        return {"lost": expert_map.num_layers * expert_map.num_experts, "survivors": 0}
    result = shrink(expert_map, dead, loads)
    before = expert_map.placement[:, alive]
    replaced = (before >= 0) & (result.refilled[:, alive] != before)
    return {
        "survivors": len(alive),
        "lost": len(result.slot_fills) + len(result.uncoverable),
        "moved": int(replaced.sum()),
        "uncoverable": len(result.uncoverable),
        "load_bytes": len(result.slot_fills) * sizes.bytes_per_expert,
        "balance": float(balance(result.refilled, loads, alive).mean()),
    }


def _place_experts(loads: NDArray[np.float64], sizes: PlanSizes) -> ExpertMap:
    ranks = sorted(sizes.node_of)
    slots = dict.fromkeys(ranks, sizes.slots_per_rank)
    try:
        result = place(
            loads, ranks, sizes.node_of, slots, redundant=sizes.redundant, survive=sizes.survive
        )
    except ValueError as error:
        raise ConfigError(f"cannot plan: {error}") from error
    return ExpertMap(
        epoch=Epoch(1),
        num_experts=sizes.experts,
        members=tuple(Member(rank=r, incarnation=Incarnation(1)) for r in ranks),
        placement=result.placement,
    )


def _sizes(
    layers: int,
    experts: int,
    ranks: int,
    nodes: int,
    slots: int | None,
    redundant: int,
    survive: int,
    bytes_per_expert: int,
) -> PlanSizes:
    if nodes > ranks:
        raise ConfigError(f"{nodes} nodes need at least as many ranks, not {ranks}")
    if experts > np.iinfo(np.int16).max:
        raise ConfigError(f"{experts} experts a layer are more than a map can name (32767)")
    enough = -(-(experts + redundant) // ranks)
    each = min(enough, experts) if slots is None else slots
    return PlanSizes(layers, experts, ranks, nodes, each, redundant, survive, bytes_per_expert)


def _from_model(folder: Path) -> tuple[int, int, int]:
    """Layers, experts and bytes of one expert. Raises CheckpointError."""
    spec = read_model_spec(folder)
    dtype = str(spec.raw.get("dtype") or spec.raw.get("torch_dtype") or "bfloat16")
    weights = 3 * spec.hidden_size * spec.moe_intermediate_size
    return spec.num_moe_layers, spec.num_experts, int(weights * WEIGHT_BYTES.get(dtype, 2.0))


def _read_loads(file: Path) -> NDArray[np.float64]:
    """Raises ConfigError where the file is missing or no table of numbers."""
    try:
        if file.suffix == ".npy":
            table = np.load(file, allow_pickle=False)
        elif file.suffix == ".json":
            table = np.array(json.loads(file.read_text()), dtype=np.float64)
        else:
            table = np.loadtxt(file, delimiter=",", ndmin=2)
        result = np.atleast_2d(np.asarray(table, dtype=np.float64))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} is no table of numbers, layers x experts: {error}") from error
    if result.ndim != 2:
        raise ConfigError(f"{file} has {result.ndim} dimensions; layers x experts are two")
    return result


def _generate_loads(
    skew: Skew, by: float, seed: int, layers: int, experts: int
) -> NDArray[np.float64]:
    """Every layer with other hot experts, as in trained models."""
    random = np.random.default_rng(seed)
    if skew is Skew.LOGNORMAL:
        return random.lognormal(0.0, by, (layers, experts))
    ranked = 1.0 / np.arange(1, experts + 1) ** (by if skew is Skew.ZIPF else 0.0)
    return np.stack([random.permutation(ranked) for _ in range(layers)])


def _draw_death(
    png: Path,
    expert_map: ExpertMap,
    loads: NDArray[np.float64],
    sizes: PlanSizes,
    layer: int,
    death: int,
) -> None:
    if layer >= sizes.layers or death >= sizes.ranks or sizes.ranks < 2:
        raise ConfigError(
            f"--layer must be below {sizes.layers} and --death a rank below {sizes.ranks}, "
            "with at least one other"
        )
    after: Placement = shrink(expert_map, {RankId(death)}, loads).refilled
    save_picture(png, expert_map.placement[layer], after[layer], loads[layer], death)


def _print_report(report: dict[str, Any], console: Console) -> None:
    peak, memory = report["balance"], report["memory"]
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [
        ("experts", f"{report['layers']} layers x {report['experts']} + {report['redundant']}"),
        (
            "cluster",
            f"{report['ranks']} ranks on {report['nodes']} nodes, "
            f"{report['slots_per_rank']} slots each",
        ),
        ("balance", f"busiest / mean rank: {peak['mean']:.4f} (worst layer {peak['max']:.4f})"),
        (
            "memory",
            f"{memory['filled_bytes_per_rank_max'] / 2**30:.2f} GiB of experts a rank, "
            f"{memory['slot_bytes_per_rank'] / 2**30:.2f} GiB with spare slots",
        ),
    ]
    if report["left_in_host_memory"]:
        rows.append(("left out", f"{report['left_in_host_memory']} coldest, in host memory"))
    for name, text in rows:
        table.add_row(f"[bold]{name}[/]", text)
    console.print(table)
    console.print(report["summary"])
    for key, what in (("rank_deaths", "rank"), ("node_deaths", "node")):
        if report[key]:
            console.print(_death_table(report[key], what, report[f"{what}s"]))


def _death_table(deaths: list[dict[str, Any]], what: str, total: int) -> Table:
    shown = "" if len(deaths) == total else f" ({len(deaths)} of {total})"
    table = Table(title=f"If one {what} dies{shown}", title_justify="left")
    for header in (what, "orphans", "replicas moved", "to load first", "no slot", "balance after"):
        table.add_column(header, justify="right")
    for row in deaths:
        if not row["survivors"]:
            table.add_row(str(row[what]), str(row["lost"]), "-", "-", "-", "nobody left")
            continue
        table.add_row(
            str(row[what]),
            str(row["lost"]),
            str(row["moved"]),
            f"{row['load_bytes'] / 2**20:.0f} MiB",
            str(row["uncoverable"]),
            f"{row['balance']:.3f}",
        )
    return table
