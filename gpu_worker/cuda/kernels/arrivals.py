"""Finds the program of a group that finishes last. That program continues with what all of them
have stored, so no second kernel is needed. No program waits for another, so they may run in any
order and number.

The protocol: each group has a count, which is zero between launches. The threads of a program
store, meet at a barrier, and one of them adds to the count with acquire-release order at device
scope. The barrier orders all their stores before the addition. The program that completes the count
has acquired what every earlier addition released. Triton passes the count to the other threads
through a barrier, which orders their loads after it. The last program sets the count back to zero,
and the next kernel sees that as it sees every other store of this one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arrive_and_test_last(count_ptr, expected):
    """Counts one arrival. True for the last of `expected`: it may read what all others stored."""
    tl.debug_barrier()
    arrived = tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") + 1
    if arrived == expected:
        tl.store(count_ptr, 0)
    return arrived == expected
