"""Whether a model's weights fit on the cards of a plan."""

from __future__ import annotations

from pathlib import Path

from cli.plan.report import PlanSizes
from shared.errors import ConfigError
from shared.expert_bytes import expert_bytes
from shared.model_spec import read_model_spec

_GIB = 2**30


def check_cards(folder: Path, sizes: PlanSizes, card_bytes: int) -> None:
    """Raises ConfigError, with the number of ranks that would do, if a card cannot hold the slots
    of its rank and all weights that are not experts. KV cache and buffers come on top of them."""
    slot_bytes = sizes.layers * sizes.bytes_per_expert
    other_bytes = _other_bytes(folder, sizes)
    needed_bytes = sizes.slots_per_rank * slot_bytes + other_bytes
    if needed_bytes <= card_bytes:
        return
    fitting = max(0, card_bytes - other_bytes) // slot_bytes
    wanted = sizes.experts + sizes.redundant
    way = (
        f"{fitting} slots fit, which takes --ranks {-(-wanted // fitting)} for {wanted} slots"
        if fitting
        else "take larger cards"
    )
    raise ConfigError(
        f"{sizes.slots_per_rank} slots on each rank take "
        f"{sizes.slots_per_rank * slot_bytes / _GIB:.1f} GiB, and the other weights "
        f"{other_bytes / _GIB:.1f} GiB, but a card has {card_bytes / _GIB:.1f} GiB: {way}"
    )


def _other_bytes(folder: Path, sizes: PlanSizes) -> int:
    """As the files have them."""
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return max(0, total - sizes.layers * sizes.experts * expert_bytes(read_model_spec(folder)))
