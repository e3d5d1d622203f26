"""Which program of a group is the last to finish: it goes on with what all have stored, in place of
a kernel after them. Nobody waits for anybody, so that programs may run in any order and number.

The protocol, for each group a count that is zero between launches: a program's threads store, meet
at a barrier, and one of them adds to the count with acquire-release order at the scope of the
device. The barrier puts all their stores before the addition. Who finds the count complete has
acquired what was released by every addition before; Triton hands the count to the other threads
through a barrier, which puts their loads behind it. The last one sets the count back to zero, which
the next kernel sees as it sees all that this one has stored.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arrive_and_test_last(count_ptr, expected):
    """Whether this is the last of `expected` arrivals, whose stores before it may then be read."""
    tl.debug_barrier()
    arrived = tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") + 1
    if arrived == expected:
        tl.store(count_ptr, 0)
    return arrived == expected
