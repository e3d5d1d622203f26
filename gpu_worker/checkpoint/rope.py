"""Rotary position embeddings: tables of cosines and sines by position, as config.json defines them.

Formulas: RoPE, arXiv 2104.09864; YaRN, arXiv 2309.00071; the factor of YaRN's cosines with `mscale`
is DeepSeek-V2's, arXiv 2405.04434. Exponents and powers are rounded to float32, as in the reference
implementation, so that results agree over long contexts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import CheckpointError

Floats = NDArray[np.float32]
Rotations = tuple[Floats, Floats]
"""Cosines and sines, each float32 `[positions, size/2]`."""


_TRAINED = "original_max_position_embeddings"
"""The context before it was stretched."""

_KNOWN_KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "attention_factor"),
    *(_TRAINED, "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    *("truncate", "finetuned"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """The embeddings that config.json asks for. `scaling` has the keys of `rope_scaling` or
    `rope_parameters`, completed. `rotated_share` is the part of a head's elements that is
    rotated."""

    theta: float
    kind: str
    scaling: Mapping[str, Any]
    context_tokens_max: int
    rotated_share: float = 1.0

    def rotations(self, size: int, context_tokens: int) -> Rotations:
        """For `size` rotated elements of a head."""
        if self.kind == "default":
            return _tables(1.0 / _powers(self.theta, size), context_tokens, 1.0)
        inverse, factor = _yarn(self, size)
        return _tables(inverse, context_tokens, factor)

    @property
    def softmax_factor(self) -> float:
        """The factor by which DeepSeek's attention multiplies its scale."""
        mscale = float(self.scaling.get("mscale_all_dim") or 0.0)
        if self.kind == "default" or not mscale:
            return 1.0
        return _mscale(_factor(self), mscale) ** 2


def read_rope(
    raw: Mapping[str, Any],
    *,
    kinds: tuple[str, ...] = ("default",),
    may_be_partial: bool = False,
) -> Rope:
    """Reads a whole config.json, with the old spelling or the new one, as transformers'
    `standardize_rope_params` does. Raises CheckpointError if the kind is not one of `kinds`, if
    there is a key that is not known, or if the config is malformed."""
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError("config.json: rope_scaling must be an object")
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind not in kinds:
        raise CheckpointError(
            f"config.json asks for rope scaling {kind!r} (rope_type), which Starfish does not serve"
        )
    for key in scaling:
        if key not in _KNOWN_KEYS:
            raise CheckpointError(f"config.json: rope scaling has {key!r}, which is not known here")
    try:
        rope = _read(raw, scaling, kind)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: missing or malformed {error}") from error
    if rope.rotated_share != 1.0 and not may_be_partial:
        raise CheckpointError(
            f"config.json asks for partial_rotary_factor={rope.rotated_share}, which Starfish does "
            "not serve for this model"
        )
    return rope


def _read(raw: Mapping[str, Any], scaling: Mapping[str, Any], kind: str) -> Rope:
    context_tokens_max = int(raw["max_position_embeddings"])
    trained = raw.get(_TRAINED)
    if trained is None:
        trained = scaling.get(_TRAINED, context_tokens_max)
    share = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if kind == "yarn":
        scaling["factor"]  # has no default
    return Rope(
        theta=float(scaling.get("rope_theta") or raw.get("rope_theta", 10_000.0)),
        kind=kind,
        scaling={**scaling, _TRAINED: int(trained)},
        context_tokens_max=context_tokens_max,
        rotated_share=1.0 if share is None else float(share),
    )


def _powers(theta: float, size: int) -> Floats:
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return np.power(theta, exponents.astype(np.float64)).astype(np.float32)


def _tables(inverse: Floats, context_tokens: int, factor: float) -> Rotations:
    """Angles are rounded to float32; cosines and sines are computed in float64, so that all
    machines agree."""
    positions = np.arange(context_tokens, dtype=np.float32)
    angles = (positions[:, None] * inverse.astype(np.float32)[None, :]).astype(np.float64)
    cos = np.cos(angles).astype(np.float32) * np.float32(factor)
    sin = np.sin(angles).astype(np.float32) * np.float32(factor)
    return cos, sin


def _yarn(rope: Rope, size: int) -> tuple[Floats, float]:
    """Inverse frequencies and the factor of cosines and sines."""
    scaling = rope.scaling
    factor, trained = _factor(rope), int(rope.scaling[_TRAINED])

    def correction_dimension(num_rotations: float) -> float:
        """The dimension that makes this many rotations over the trained context."""
        return size * math.log(trained / (num_rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = correction_dimension(float(scaling.get("beta_fast") or 32))
    high = correction_dimension(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(size // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = np.float32(1.0) - np.clip(ramp, 0.0, 1.0)
    powers = _powers(rope.theta, size)
    stretched = np.float32(1.0) / (np.float32(factor) * powers)
    inverse = stretched * (1 - kept) + (np.float32(1.0) / powers) * kept
    return inverse.astype(np.float32), _yarn_attention_factor(scaling, factor)


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        return _mscale(factor, float(mscale)) / _mscale(factor, float(all_dim))
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _factor(rope: Rope) -> float:
    given = rope.scaling.get("factor")
    return rope.context_tokens_max / int(rope.scaling[_TRAINED]) if given is None else float(given)
