"""A fork server may prepare kernels: that touches no device, and leaves the first launch less to
do."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton")

_CHECKS = """
import sys
import torch
import gpu_worker.cuda.decoder
from gpu_worker.cuda.kernels import linear
from gpu_worker.cuda.kernels.preload import preload_kernels
from triton.runtime.cache import triton_key
from triton.runtime.jit import JITFunction

def kernels():
    return [each for each in vars(linear).values() if isinstance(each, JITFunction)]

assert kernels() and all(kernel.hash is None for kernel in kernels())
preload_kernels()
assert triton_key.cache_info().currsize == 1
assert "triton.experimental.gluon.nvidia.hopper" in sys.modules
assert all(len(kernel.hash) == 64 for kernel in kernels())
assert not torch.cuda.is_initialized()
"""


def test_preloading_touches_no_device() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CHECKS], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
