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


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """The embeddings that config.json asks for. `scaling` has the keys of `rope_scaling` or
    `rope_parameters`."""

    theta: float
    kind: str
    scaling: Mapping[str, Any]
    context_tokens_max: int

    def rotations(self, size: int, context_tokens: int) -> Rotations:
        """For `size` rotated elements of a head. Raises CheckpointError."""
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


def read_rope(raw: Mapping[str, Any], *, kinds: tuple[str, ...] = ("default",)) -> Rope:
    """Reads a whole config.json, with the old key or the new one. Raises CheckpointError if the
    kind is not one of `kinds`, or if the config is malformed."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind not in kinds:
        raise CheckpointError(
            f"config.json asks for rope scaling {kind!r}, which Starfish does not serve"
        )
    try:
        return Rope(
            theta=float(scaling.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
            kind=kind,
            scaling=scaling,
            context_tokens_max=int(raw["max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: missing or malformed {error}") from error


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
    factor, trained = _factor(rope), _trained_tokens(rope)

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
    return rope.context_tokens_max / _trained_tokens(rope) if given is None else float(given)


def _trained_tokens(rope: Rope) -> int:
    trained = rope.scaling.get("original_max_position_embeddings")
    if trained is None:
        raise CheckpointError("config.json: YaRN lacks original_max_position_embeddings")
    return int(trained)
