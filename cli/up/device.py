"""What the ranks of this host run on: GPUs or CPUs, and whether ranks share GPUs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from shared.errors import ConfigError

_QUERY = ("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader")
_QUERY_TIMEOUT_S = 30.0

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """`on_cuda`: there are GPUs to use. If `device` is "auto" and the model does not run on GPUs,
    the ranks still use the CPU. `mps`: ranks share GPUs through the instance's own CUDA MPS
    daemon."""

    on_cuda: bool
    num_gpus: int
    mps: bool

    def __str__(self) -> str:
        if not self.on_cuda:
            return "CPU"
        gpus = "1 GPU" if self.num_gpus == 1 else f"{self.num_gpus} GPUs"
        return f"{gpus}{', shared under MPS' if self.mps else ''}"


def plan_device(device: str, cuda_mps: bool | None, num_ranks: int, num_gpus: int) -> DevicePlan:
    """If `cuda_mps` is None, MPS is used if there are more ranks than GPUs. Without MPS, ranks on
    one GPU alternate in time slices of milliseconds, many times per step. Raises ConfigError."""
    if device == "cuda" and not num_gpus:
        raise ConfigError("--device cuda: nvidia-smi finds no GPU here; pass --device cpu")
    on_cuda = num_gpus > 0 and device != "cpu"
    if cuda_mps and not on_cuda:
        raise ConfigError("--cuda-mps: the ranks run on the CPU, so there is no GPU to share")
    wanted = num_ranks > num_gpus if cuda_mps is None else cuda_mps
    return DevicePlan(on_cuda=on_cuda, num_gpus=num_gpus, mps=on_cuda and wanted)


def num_visible_gpus(num_gpus: int, environ: Mapping[str, str]) -> int:
    """How many of `num_gpus` GPUs this process may use."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return num_gpus
    return min(
        num_gpus, len([part for part in chosen.split(",") if part.strip() not in ("", "-1")])
    )


async def count_gpus() -> int:
    """Counts GPUs without creating a CUDA context, which would use their memory. Raises
    ConfigError."""
    try:
        process = await asyncio.create_subprocess_exec(
            *_QUERY,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return 0
    try:
        async with asyncio.timeout(_QUERY_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        raise ConfigError(
            f"nvidia-smi did not answer within {_QUERY_TIMEOUT_S:.0f} s; pass --device cpu"
        ) from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return len(output.split()) if process.returncode == 0 else 0
