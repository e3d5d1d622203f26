"""KV blocks: nobody shares one, none is lost."""

from __future__ import annotations

import pytest

from gpu_worker.engine.kv_blocks import KvBlocks


def blocks(num_blocks: int = 6) -> KvBlocks:
    return KvBlocks(num_blocks=num_blocks, block_tokens=4, rows_max=3, row_blocks_max=num_blocks)


def test_rows_never_share_a_block() -> None:
    kv = blocks()
    first, second = kv.open(2), kv.open(3)
    tables = kv.tables([first, second])
    used = [block for block in tables.ravel().tolist() if block >= 0]
    assert sorted(used) == sorted(set(used))
    assert len(used) == 5
    assert kv.num_free == 1


def test_tables_are_padded_to_the_longest_row_asked_for() -> None:
    kv = blocks()
    short, long = kv.open(1), kv.open(3)
    assert kv.tables([short, long]).shape == (2, 3)
    assert kv.tables([short, long])[0, 1:].tolist() == [-1, -1]
    assert kv.tables([short]).shape == (1, 1)
    assert kv.tables([]).shape == (0, 0)


def test_a_closed_row_gives_all_its_blocks_back() -> None:
    kv = blocks()
    row = kv.open(2)
    kv.extend(row, 4)
    assert kv.num_free == 0
    kv.close(row)
    assert kv.num_free == 6
    assert kv.tables([kv.open(6)]).min() == 0


def test_shrink_undoes_extend_to_the_very_block() -> None:
    kv = blocks()
    row = kv.open(1)
    kv.extend(row, 2)
    before = kv.tables([row]).tolist()
    kv.shrink(row, 2)
    assert kv.capacity_tokens(row) == 4
    kv.extend(row, 2)
    assert kv.tables([row]).tolist() == before


def test_taking_what_is_not_there_is_an_error() -> None:
    kv = blocks()
    row = kv.open(6)
    with pytest.raises(AssertionError):
        kv.extend(row, 1)


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_round_up(tokens: int, expected: int) -> None:
    assert blocks().blocks_for(tokens) == expected
