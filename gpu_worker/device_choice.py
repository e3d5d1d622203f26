"""Whether a rank computes on a card. If the host has no device file of one, torch is not imported:
that would take a second and 200 MB."""

from __future__ import annotations

from pathlib import Path

import structlog

from gpu_worker.config import RankConfig
from shared.errors import CheckpointError, ConfigError
from shared.model_spec import ModelSpec
from shared.records import InstanceSpec
from shared.types import DeviceKind

log = structlog.get_logger()

_DEVICES = Path("/dev")


def uses_cuda(config: RankConfig, model: ModelSpec) -> bool:
    """Raises ConfigError if a card is requested and there is none."""
    if config.device is DeviceKind.CPU:
        return False
    if not _has_card():
        if config.device is DeviceKind.CUDA:
            raise ConfigError("--device cuda: no CUDA device is visible here; pass --device cpu")
        return False
    return config.device is DeviceKind.CUDA or _is_served(model)


def require_drafts(spec: InstanceSpec, *, on_card: bool) -> None:
    """Raises ConfigError if the instance decodes speculatively, and this device cannot."""
    if on_card and spec.speculative_tokens:
        raise ConfigError(
            "this instance drafts tokens (--speculative-tokens), which ranks on cards cannot do: "
            "pass --device cpu to them, or start the instance without it"
        )


def _is_served(model: ModelSpec) -> bool:
    from gpu_worker.cuda.weights.checkpoint_layouts import checkpoint_layout_of

    try:
        checkpoint_layout_of(model)
    except CheckpointError as error:
        log.warning("computes_on_cpu", detail=str(error))
        return False
    return True


def has_device_file() -> bool:
    """Whether this host seems to have a card. Touches no driver, so a fork may follow."""
    return any(_DEVICES.glob("nvidia[0-9]*"))


def _has_card() -> bool:
    if not has_device_file():
        return False
    import torch

    return torch.cuda.is_available()
