"""How many bytes a model's weights take in slots and on a card, by the number format that its
config.json names, and whether that fits."""

from __future__ import annotations

from pathlib import Path

from cli.plan.report import PlanSizes
from shared.errors import ConfigError
from shared.model_spec import ModelSpec, read_model_spec

_WEIGHT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
_BLOCK = 128
"""Of the block-scaled FP8 that ranks on cards keep as it is."""
_SCALE_BYTES = 4
_GIB = 2**30


def expert_bytes(spec: ModelSpec) -> int:
    """Of one expert in a slot. FP8 in blocks of another size, and formats of other kinds, are
    widened on load."""
    hidden, inner = spec.hidden_size, spec.moe_intermediate_size
    if _keeps_fp8(spec):
        return 3 * (hidden * inner + _SCALE_BYTES * _blocks(hidden) * _blocks(inner))
    dtype = str(spec.raw.get("dtype") or spec.raw.get("torch_dtype") or "bfloat16")
    return 3 * hidden * inner * _WEIGHT_BYTES.get(dtype, 2)


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


def _keeps_fp8(spec: ModelSpec) -> bool:
    quantisation = spec.raw.get("quantization_config") or {}
    return (
        isinstance(quantisation, dict)
        and quantisation.get("quant_method") == "fp8"
        and quantisation.get("weight_block_size") == [_BLOCK, _BLOCK]
    )


def _blocks(size: int) -> int:
    return -(-size // _BLOCK)
