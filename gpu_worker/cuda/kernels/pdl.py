"""Programmatic dependent launch: a kernel's prologue, and what it reads of the weights, run while
its predecessors drain."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def release_successor(PDL: tl.constexpr):
    """The successor may be launched from here on. Its programs come to rest in `await_predecessor`
    and cannot keep this kernel's from running: they start when all of these have started."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_predecessor(PDL: tl.constexpr):
    """Before any read of what another kernel writes and before any write. Weights may be read
    before: no kernel of a step writes them. All kernels wait here, so all earlier ones are done."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def after_predecessor(PDL: tl.constexpr):
    release_successor(PDL)
    await_predecessor(PDL)


@triton.jit
def prefetch(ptrs):
    """Asks for the 128 bytes at each pointer to be brought into the L2 cache; waits for nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [ptrs.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def launch_options(pdl: bool) -> dict[str, Any]:
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
