"""Programmatic dependent launch: a kernel's prologue runs while its predecessor drains."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def after_predecessor(PDL: tl.constexpr):
    """Call first, before any read of what another kernel writes and before any write. The successor
    may be launched from here on; it waits in the same place. Weights may be read before: no kernel
    of a step writes them."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def launch_options(pdl: bool) -> dict[str, Any]:
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
