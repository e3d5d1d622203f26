"""What is remembered of a rank's prefix cache, and what is forgotten first."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from gateway.prefix_memory import PrefixMemory, prefix_chain

PROMPT = tuple(range(100))


def test_a_chain_has_an_entry_for_each_full_block() -> None:
    assert [len(prefix_chain(PROMPT[:n], 16)) for n in (0, 15, 16, 31, 100)] == [0, 0, 1, 1, 6]


def test_chains_agree_as_far_as_the_prompts_do() -> None:
    chain, other = prefix_chain(PROMPT, 16), prefix_chain((*PROMPT[:40], *PROMPT), 16)
    assert [a == b for a, b in zip(chain, other, strict=False)] == [True] * 2 + [False] * 4


def test_a_chain_is_the_same_in_another_process() -> None:
    code = "from gateway.prefix_memory import prefix_chain; print(prefix_chain(range(100), 16))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert said.decode().strip() == str(prefix_chain(PROMPT, 16))


@given(
    prompts=st.lists(
        st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple), min_size=1, max_size=12
    ),
    blocks_max=st.integers(1, 8),
)
def test_a_parent_is_remembered_as_long_as_its_child(
    prompts: list[tuple[int, ...]], blocks_max: int
) -> None:
    memory = PrefixMemory(blocks_max)
    chains = [prefix_chain(prompt, 1) for prompt in prompts]
    for chain in chains:
        memory.remember(chain)
        assert memory.num_known(chain) == min(len(chain), blocks_max)
        assert len(memory) <= blocks_max
    for chain in chains:
        known = [memory.num_known(chain[: n + 1]) == n + 1 for n in range(len(chain))]
        assert known == sorted(known, reverse=True)
        assert memory.num_known(chain) == sum(known)
