"""The loads of experts that a placement is planned for: read from a file, or generated."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigError


class Skew(Enum):
    """How uneven the generated loads are."""

    LOGNORMAL = "lognormal"
    ZIPF = "zipf"
    EVEN = "even"


def read_loads(file: Path) -> NDArray[np.float64]:
    """`[layers, experts]`. Raises ConfigError if the file is missing or is not such a table."""
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
        raise ConfigError(f"{file} is not a table of numbers, layers x experts: {error}") from error
    if result.ndim != 2:
        raise ConfigError(f"{file} has {result.ndim} dimensions; pass two: layers x experts")
    return result


def generate_loads(
    skew: Skew, by: float, seed: int, layers: int, experts: int
) -> NDArray[np.float64]:
    """`[layers, experts]`. The hot experts differ from layer to layer, as in trained models."""
    random = np.random.default_rng(seed)
    if skew is Skew.LOGNORMAL:
        return random.lognormal(0.0, by, (layers, experts))
    ranked = 1.0 / np.arange(1, experts + 1) ** (by if skew is Skew.ZIPF else 0.0)
    return np.stack([random.permutation(ranked) for _ in range(layers)])
