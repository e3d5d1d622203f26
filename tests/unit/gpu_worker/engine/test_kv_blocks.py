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


# named blocks


def published(kv: KvBlocks, names: tuple[bytes, ...]) -> int:
    """A row that has computed a chain."""
    row = kv.open(len(names), names)
    for column in range(kv.num_cached(names), len(names)):
        kv.publish(row, column, names[column])
    return row


def table(kv: KvBlocks, row: int) -> list[int]:
    blocks_of_row: list[int] = kv.tables([row])[0].tolist()
    return blocks_of_row


def test_a_published_prefix_is_shared_and_the_rest_is_not() -> None:
    kv = blocks()
    first = published(kv, (b"a", b"b"))
    assert kv.num_needed(3, (b"a", b"b", b"c")) == 1
    second = kv.open(3, (b"a", b"b", b"c"))
    assert table(kv, second)[:2] == table(kv, first)
    assert kv.num_free == 3
    kv.close(first)
    assert kv.num_free == 3
    kv.close(second)
    assert kv.num_free == 6


def test_blocks_stay_cached_until_their_memory_is_wanted_leaves_first() -> None:
    kv = blocks()
    kv.close(published(kv, (b"a", b"b", b"c")))
    assert (kv.num_free, kv.num_cached((b"a", b"b", b"c"))) == (6, 3)
    row = kv.open(4)
    assert kv.num_cached((b"a", b"b", b"c")) == 2
    kv.close(row)
    assert kv.num_cached((b"a", b"b", b"c")) == 2
    kv.open(6)
    assert (kv.num_cached((b"a",)), kv.num_named) == (0, 0)


def test_idle_cached_blocks_are_needed_as_fresh_ones_are() -> None:
    kv = blocks()
    kv.close(published(kv, (b"a", b"b")))
    assert kv.num_needed(3, (b"a", b"b")) == 3
    before = kv.num_free
    kv.open(3, (b"a", b"b"))
    assert before - kv.num_free == 3


def test_what_was_used_last_is_kept_longest() -> None:
    kv = blocks()
    kv.close(published(kv, (b"a", b"b")))
    kv.close(published(kv, (b"x", b"y")))
    kv.close(kv.open(2, (b"a", b"b")))
    kv.open(4)
    assert (kv.num_cached((b"a", b"b")), kv.num_cached((b"x", b"y"))) == (2, 0)


def test_of_two_blocks_of_one_name_one_is_given_back() -> None:
    kv = blocks()
    first, second = kv.open(2), kv.open(2)
    for row in (first, second):
        kv.publish(row, 0, b"a")
    assert table(kv, first)[0] == table(kv, second)[0]
    assert table(kv, first)[1] != table(kv, second)[1]
    assert kv.num_free == 3


def test_a_block_is_published_once() -> None:
    kv = blocks()
    row = published(kv, (b"a",))
    with pytest.raises(AssertionError):
        kv.publish(row, 0, b"b")
