"""Runs inside the CUDA image, as its user, on a machine without a card: what ranks on cards load
and compile is there. The driver is not: its libcuda.so.1 comes with the card's host."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpu_worker.cuda.kernels import linear

SITE = Path(sysconfig.get_path("purelib"))
NVCC = os.environ["MOONCAKE_EP_JIT_NVCC"]
MOONCAKE_HEADERS = SITE / "mooncake" / "mooncake_ep_jit"
DRIVER = "libcuda.so.1"
HIDDEN = 7168
EXCHANGE = f"""
#include <mooncake_ep_dispatch.cuh>
#include <mooncake_ep_combine.cuh>
extern "C" __global__ void dispatch(const mooncake::DispatchKernelArgs p) {{
    mooncake::dispatch_kernel_impl<false, 3, 10, {HIDDEN}>(p);
}}
extern "C" __global__ void combine(const mooncake::CombineKernelArgs p) {{
    mooncake::combine_kernel_impl<3, 10, {HIDDEN}, 17>(p);
}}
"""


def check_user() -> None:
    assert os.getuid() != 0
    for folder in ("/", "/opt/starfish", str(SITE)):
        assert not os.access(folder, os.W_OK), folder
    for name in ("MOONCAKE_EP_JIT_CACHE_DIR", "TRITON_CACHE_DIR"):
        Path(os.environ[name]).mkdir()


def check_torch() -> None:
    assert torch.version.cuda is not None
    assert not torch.cuda.is_available()


def check_libraries() -> None:
    """Nothing but the driver is missing of what torch, Mooncake and Triton are linked with."""
    libraries = [
        library
        for package in ("torch/lib", "mooncake", "triton/_C")
        for library in (SITE / package).glob("*.so")
    ]
    assert len(libraries) > 15
    absent = set()
    for library in libraries:
        listed = subprocess.run(["ldd", str(library)], check=True, capture_output=True, text=True)
        lines = listed.stdout.splitlines()
        absent |= {line.split()[0] for line in lines if line.endswith("not found")}
    assert absent == {DRIVER}, absent


def check_triton() -> None:
    """A kernel compiles for an H100, into the volume; and so would Triton's own launcher."""
    kernel = linear._linear_parts
    tile = linear._tile_for(1)
    constants = {
        "INNER": HIDDEN,
        "COLUMNS": 2112,
        "PART": HIDDEN // 4,
        "BLOCK_T": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
    }
    kinds = iter(["*bf16", "*bf16", "*fp32", "i32"])
    signature = {n: "constexpr" if n in constants else next(kinds) for n in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    assert compiled.asm["cubin"]
    assert list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))
    backend = SITE / "triton" / "backends" / "nvidia"
    headers = [f"-I{backend / 'include'}", f"-I{sysconfig.get_path('include')}"]
    subprocess.run(["gcc", "-fsyntax-only", *headers, str(backend / "driver.c")], check=True)


def check_exchange() -> None:
    """Mooncake's kernels compile, with the flags that it passes."""
    roots = ("include", "include/mooncake_ep", "tent/include")
    headers = [f"-I{MOONCAKE_HEADERS / root}" for root in roots]
    flags = ["-cubin", "-arch=sm_90a", "--std=c++17", "--extended-lambda"]
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        source.write_text(EXCHANGE)
        command = [NVCC, *flags, "--expt-relaxed-constexpr", *headers, "-o", str(cubin)]
        subprocess.run([*command, str(source)], check=True)
        assert cubin.stat().st_size > 10_000


CHECKS: tuple[Callable[[], None], ...] = (
    check_user,
    check_torch,
    check_libraries,
    check_triton,
    check_exchange,
)

for check in CHECKS:
    check()
    print(f"   {check.__name__}: passed", flush=True)
