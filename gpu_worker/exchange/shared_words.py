"""Words in memory that two processes share: loads and stores in an order that both see, and sleep
until the other process rings. x86 keeps stores in order by itself, arm does not.

A bell is two int32: the number of rings, and whether somebody sleeps. A writer publishes first and
rings afterwards; a sleeper reads the number before it looks for what was published, and the kernel
lets it sleep only if the number is still the same. So no ring is lost, and none costs a system call
if nobody sleeps."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numba.np.numpy_support import carray
from numpy.typing import NDArray

BELL_BYTES = 8
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_NONE, _ONE = np.int32(0), np.int32(1)
_TRIES = 4
"""How often it goes back to sleep at most if what rang was another message."""
_FUTEX_CALLS = {"x86_64": 202, "aarch64": 98}
_FUTEX = _FUTEX_CALLS.get(platform.machine(), -1)

_syscall: Any = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))
_sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())


def can_sleep_on_words() -> bool:
    """Whether this file knows the machine's system calls."""
    return _FUTEX >= 0


def _load(_: Any, address: Any, like: Any) -> Any:
    """The word at `address`, of the type of `like`. What is read later was written no earlier."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], arguments[1].type.as_pointer())
        return builder.load_atomic(pointer, "acquire", like.bitwidth // 8)

    return like(types.int64, like), generate


def _store(_: Any, address: Any, value: Any) -> Any:
    """Whoever loads this value sees all that was written before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], arguments[1].type.as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", value.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


def _add(_: Any, address: Any, value: Any) -> Any:
    """The word as it was before. Nothing moves across it, in either direction."""
    return _atomic("add", value)


def _swap(_: Any, address: Any, value: Any) -> Any:
    """As `_add`, but replaces the word."""
    return _atomic("xchg", value)


def _atomic(operation: str, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], arguments[1].type.as_pointer())
        return builder.atomic_rmw(operation, pointer, arguments[1], "seq_cst")

    return value(types.int64, value), generate


def _fence(_: Any) -> Any:
    """Nothing is written earlier, and nothing that was to be read before is read later."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("acq_rel")
        return context.get_dummy_value()

    return types.void(), generate


def _pointer(_: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


load: Any = intrinsic(_load)
store: Any = intrinsic(_store)
add: Any = intrinsic(_add)
swap: Any = intrinsic(_swap)
fence: Any = intrinsic(_fence)
pointer: Any = intrinsic(_pointer)


@njit(nogil=True, cache=True)
def words_at(address: int, count: int) -> NDArray[np.int64]:
    """The memory at an address, as an array; so, too, the next two. For compiled callers."""
    words: NDArray[np.int64] = carray(pointer(address), (count,), np.int64)
    return words


@njit(nogil=True, cache=True)
def ints_at(address: int, count: int) -> NDArray[np.int32]:
    ints: NDArray[np.int32] = carray(pointer(address), (count,), np.int32)
    return ints


@njit(nogil=True, cache=True)
def rows_at(address: int, count: int, hidden_size: int) -> NDArray[np.float32]:
    rows: NDArray[np.float32] = carray(pointer(address), (count, hidden_size), np.float32)
    return rows


def compile_all() -> None:
    """Compiles what is called from Python, or loads it from the cache."""
    words = np.zeros(2, dtype=np.int64)
    address = int(words.ctypes.data)
    begin_write(address)
    publish(address, 1)
    ring(address + 8)


@njit(nogil=True, cache=True)
def begin_write(head: int) -> None:
    """Clears the stamp at address `head`, before anything behind it is written."""
    store(head, 0)
    fence()


@njit(nogil=True, cache=True)
def publish(head: int, stamp: int) -> None:
    """Stamps what was written behind `head`: whoever sees the stamp sees all of it."""
    store(head, stamp)


@njit(nogil=True, cache=True)
def has_stamp(head: int, stamp: int) -> bool:
    """Before reading what is behind `head`, and again afterwards: it was not written meanwhile."""
    fence()
    found: bool = load(head, 0) == stamp
    return found


@njit(nogil=True, cache=True)
def ring(bell: int) -> None:
    """Wakes who sleeps on `bell`."""
    add(bell, _ONE)
    if load(bell + 4, _ONE) != 0:
        swap(bell + 4, _NONE)
        _syscall(_FUTEX, bell, _FUTEX_WAKE, 1, 0, 0, 0)


@njit(nogil=True, cache=True)
def wait_for_stamp(head: int, stamp: int, bell: int, num_yields: int, sleep_ns: int) -> bool:
    """Whether the stamp is there, after it yielded the CPU up to `num_yields` times and then slept
    on `bell` for up to `sleep_ns` (below a second)."""
    for _ in range(num_yields):
        if load(head, 0) == stamp:
            return True
        _sched_yield()
    timespec = np.zeros(2, dtype=np.int64)
    timespec[1] = sleep_ns
    for _ in range(_TRIES):
        num_rings = load(bell, _ONE)
        if load(head, 0) == stamp:
            return True
        swap(bell + 4, _ONE)
        _syscall(_FUTEX, bell, _FUTEX_WAIT, num_rings, timespec.ctypes.data, 0, 0)
        if load(bell, _ONE) == num_rings:
            break  # nobody rang
    found: bool = load(head, 0) == stamp
    return found
