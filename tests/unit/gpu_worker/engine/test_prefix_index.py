"""What is found, and what goes first when memory is wanted."""

from __future__ import annotations

import pytest

from gpu_worker.engine.prefix_index import PrefixIndex

A, B, C, D = b"a", b"b", b"c", b"d"


def index_of(*names: bytes) -> PrefixIndex:
    """All in use, in blocks 0, 1, …"""
    index = PrefixIndex()
    for block, name in enumerate(names):
        index.add(name, block)
    return index


@pytest.mark.parametrize(
    ("chain", "known"), [((), 0), ((A, B, D), 2), ((A, B, C), 3), ((D,), 0), ((A,), 1)]
)
def test_the_longest_known_prefix_is_found(chain: tuple[bytes, ...], known: int) -> None:
    assert index_of(A, B, C).num_known(chain) == known


def test_idle_blocks_are_known_and_not_in_use() -> None:
    index = index_of(A, B, C)
    index.mark_idle(2)
    index.mark_idle(1)
    assert (index.num_known((A, B, C)), index.num_in_use((A, B, C))) == (3, 1)
    assert (index.num_named, index.num_idle) == (3, 2)


def test_who_rests_longest_is_evicted_and_forgotten() -> None:
    index = index_of(A, B, C)
    index.mark_idle(2)
    index.mark_idle(1)
    assert index.evict() == 2
    assert (index.num_known((A, B, C)), index.name_of(2)) == (2, None)
    index.add(D, 2)
    assert index.block_of(D) == 2


def test_a_block_in_use_again_is_not_evicted_and_becomes_idle_again() -> None:
    index = index_of(A, B)
    index.mark_idle(0)
    index.mark_idle(1)
    index.mark_used(0)
    assert index.evict() == 1
    assert index.num_idle == 0


def test_neither_a_name_nor_a_block_is_taken_twice() -> None:
    index = index_of(A)
    with pytest.raises(AssertionError):
        index.add(A, 1)
    with pytest.raises(AssertionError):
        index.add(B, 0)
