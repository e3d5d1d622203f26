"""What Triton does once a process before its first kernel runs, done ahead of time: it is most of
the time in which a rank captures its graphs. Touches no device, so that a fork server may do it."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from types import ModuleType

_KERNELS = "gpu_worker.cuda.kernels."


def preload_kernels() -> None:
    """Has Triton hash itself and the kernels that are imported by now: the names of compiled
    kernels in its cache are made of both. A Triton that does this otherwise does it later, as
    without a call. Raises ImportError if there is none."""
    from triton.runtime.jit import JITFunction

    with suppress(ImportError, AttributeError):
        from triton.runtime.cache import triton_key

        triton_key()
    with suppress(ImportError):  # its dialect for one card: looked for by the first launch
        importlib.import_module("triton.experimental.gluon.nvidia.hopper")
    for kernel in (each for module in _kernel_modules() for each in vars(module).values()):
        if isinstance(kernel, JITFunction):
            with suppress(AttributeError):
                kernel.cache_key  # noqa: B018 - computed once, and kept


def _kernel_modules() -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if name.startswith(_KERNELS)]
