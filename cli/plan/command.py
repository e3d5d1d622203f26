"""`starfish plan`: shows what the planner would do with a cluster that need not exist. The planner
itself is `control_plane.placement`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from cli.flags import flags_from_dataclasses
from cli.plan.card_check import check_cards
from cli.plan.loads import Skew, generate_loads, read_loads
from cli.plan.picture import save_picture
from cli.plan.report import PlanSizes, print_report, report_of
from cli.target_flags import JsonFlag
from control_plane.placement import place, shrink
from shared.errors import ConfigError, StarfishError
from shared.expert_bytes import expert_bytes
from shared.expert_map import ExpertMap, Placement
from shared.model_spec import read_model_spec
from shared.types import Epoch, Incarnation, Member, RankId


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """`starfish plan`'s flags. `model` replaces layers, experts and bytes; `loads` replaces layers
    and experts."""

    experts: Annotated[int, typer.Option(min=1, help="Experts per layer.")] = 256
    layers: Annotated[int, typer.Option(min=1, help="Number of MoE layers.")] = 61
    ranks: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 32
    nodes: Annotated[
        int, typer.Option(min=1, help="Number of nodes; each has an equal share of the ranks.")
    ] = 4
    redundant: Annotated[
        int,
        typer.Option(
            "--redundant", min=0, help="Slots to fill per layer, beyond one for each expert."
        ),
    ] = 256
    slots: Annotated[
        int | None, typer.Option(min=0, help="Slots on each rank (default: just enough).")
    ] = None
    survive: Annotated[
        int,
        typer.Option(min=0, help="Rank failures to survive, even if that makes balance worse."),
    ] = 0
    loads: Annotated[
        Path | None, typer.Option(help="File of loads, layers x experts: .npy, .json or .csv.")
    ] = None
    skew: Annotated[Skew, typer.Option(help="Without --loads: the kind of loads to generate.")] = (
        Skew.LOGNORMAL
    )
    skew_by: Annotated[
        float, typer.Option(min=0, help="Without --loads: sigma, or Zipf's exponent.")
    ] = 0.7
    seed: Annotated[int, typer.Option(min=0, help="Without --loads: seed of the loads.")] = 0
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint folder from which to take experts, layers and bytes."),
    ] = None
    expert_mib: Annotated[
        float, typer.Option(min=0, help="Without --model: MiB of one expert's weights.")
    ] = 42.0
    card_gib: Annotated[
        float,
        typer.Option(
            min=0,
            help="With --model: GiB of a card's memory. Refuses slots and weights that do not fit.",
        ),
    ] = 0.0
    png: Annotated[
        Path | None,
        typer.Option(help="Picture file to write: one layer before and after a death."),
    ] = None
    layer: Annotated[int, typer.Option(min=0, help="With --png: the layer.")] = 0
    death: Annotated[int, typer.Option(min=0, help="With --png: the rank that dies.")] = 0


@flags_from_dataclasses
def plan(options: PlanOptions, as_json: JsonFlag = False) -> None:
    """Show a placement, what it survives, and what each possible death would move."""
    try:
        layers, experts = options.layers, options.experts
        bytes_per_expert = round(options.expert_mib * 2**20)
        if options.model is not None:
            layers, experts, bytes_per_expert = _from_model(options.model)
        if options.loads is not None:
            loads = read_loads(options.loads)
        else:
            loads = generate_loads(options.skew, options.skew_by, options.seed, layers, experts)
        sizes = _sizes(options, loads, bytes_per_expert)
        if options.model is not None and options.card_gib:
            check_cards(options.model, sizes, round(options.card_gib * 2**30))
        expert_map = _place_experts(loads, sizes)
        report = report_of(expert_map, loads, sizes)
        if options.png is not None:
            _draw_death(options.png, expert_map, loads, sizes, options.layer, options.death)
    except StarfishError as error:
        typer.echo(f"starfish: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(report))
    else:
        print_report(report, Console())


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


def _sizes(options: PlanOptions, loads: NDArray[np.float64], bytes_per_expert: int) -> PlanSizes:
    """Raises ConfigError if no such cluster can be."""
    layers, experts = loads.shape
    ranks, nodes = options.ranks, options.nodes
    if nodes > ranks:
        raise ConfigError(
            f"{nodes} nodes need at least as many ranks; pass --ranks {nodes} or more"
        )
    if experts > np.iinfo(np.int16).max:
        raise ConfigError(f"{experts} experts per layer are more than a map can hold (32767)")
    enough = -(-(experts + options.redundant) // ranks)
    return PlanSizes(
        layers=layers,
        experts=experts,
        ranks=ranks,
        nodes=nodes,
        slots_per_rank=min(enough, experts) if options.slots is None else options.slots,
        redundant=options.redundant,
        survive=options.survive,
        bytes_per_expert=bytes_per_expert,
    )


def _from_model(folder: Path) -> tuple[int, int, int]:
    """Layers, experts and bytes of one expert. Raises CheckpointError."""
    spec = read_model_spec(folder)
    return spec.num_moe_layers, spec.num_experts, expert_bytes(spec)


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
