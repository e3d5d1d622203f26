"""Names of KV blocks: equal for equal prefixes, and for nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.engine.block_names import extend_names

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=30)


def names_of(tokens: list[int], block_tokens: int = 4, salt: bytes = b"") -> list[bytes]:
    names: list[bytes] = []
    extend_names(names, tokens, block_tokens, salt=salt)
    return names


def test_only_full_blocks_have_names() -> None:
    assert [len(names_of([7] * n)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


@given(tokens=TOKENS, cuts=st.lists(st.integers(0, 30), max_size=5))
def test_names_do_not_depend_on_when_they_were_asked_for(
    tokens: list[int], cuts: list[int]
) -> None:
    names: list[bytes] = []
    for cut in sorted(cuts):
        extend_names(names, tokens[:cut], 4)
    extend_names(names, tokens, 4)
    assert names == names_of(tokens)


@given(one=TOKENS, other=TOKENS, shared=TOKENS)
def test_names_are_equal_as_far_as_the_prefixes_are(
    one: list[int], other: list[int], shared: list[int]
) -> None:
    first, second = shared + one, shared + other
    for column, pair in enumerate(zip(names_of(first), names_of(second), strict=False)):
        end = 4 * (column + 1)
        assert (pair[0] == pair[1]) == (first[:end] == second[:end])


def test_equal_blocks_at_different_places_differ() -> None:
    assert len(set(names_of([1] * 16))) == 4


@given(tokens=TOKENS, salts=st.sets(st.binary(min_size=32, max_size=32), min_size=2, max_size=4))
def test_no_name_is_known_under_two_salts(tokens: list[int], salts: set[bytes]) -> None:
    chains = [names_of(tokens, salt=salt) for salt in (b"", *salts)]
    names = [name for chain in chains for name in chain]
    assert len(set(names)) == len(names)
    assert {len(chain) for chain in chains} == {len(tokens) // 4}
