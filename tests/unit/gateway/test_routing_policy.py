"""What every routing policy keeps to, whatever has happened, and what each of them is for."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.rank_choice import RankChooser
from gateway.routing_policy import routing_policy
from shared.types import ROUTING_POLICIES, Incarnation, Member, RankId
from shared.wire import Load

BLOCK = 16
PROMPT = tuple(range(10 * BLOCK))

every_policy = pytest.mark.parametrize("policy", ROUTING_POLICIES)


def member(rank: int) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(1))


def chooser(policy: str, num_ranks: int = 4, seed: int = 0) -> RankChooser:
    ranks = RankChooser(routing_policy(policy, random.Random(seed)))
    ranks.on_map([member(rank) for rank in range(num_ranks)])
    for rank in range(num_ranks):
        ranks.on_link_opened(member(rank), kv_block_tokens=BLOCK)
    return ranks


def report(ranks: RankChooser, rank: int, *, tokens: int = 0, free: int = 1000) -> None:
    load = Load(running=0, waiting=0, tokens=tokens, kv_blocks_free=free, kv_blocks=1000)
    ranks.on_load(member(rank), load)


def place(ranks: RankChooser, prompt: tuple[int, ...], backup_rank: int | None = None) -> int:
    backup = None if backup_rank is None else RankId(backup_rank)
    chosen = ranks.choose(prompt, backup_rank=backup)
    assert chosen is not None
    ranks.add(chosen, sessions=1, tokens=len(prompt))
    return chosen.rank


class Fitness:
    """What a rank's state is worth, kept by the test itself."""

    def __init__(self) -> None:
        self.linked = self.in_map = True
        self.silent = self.full = False

    @property
    def live(self) -> bool:
        return self.linked and self.in_map


changes = st.tuples(
    st.sampled_from(["break", "open", "leave", "join", "silence", "answer", "fill", "free"]),
    st.integers(0, 3),
)


def change(ranks: RankChooser, known: list[Fitness], what: str, rank: int) -> None:
    of_rank = known[rank]
    match what:
        case "break":
            ranks.on_link_broken(member(rank))
            of_rank.linked = False
        case "open" if not of_rank.linked:
            ranks.on_link_opened(member(rank), kv_block_tokens=BLOCK)
            of_rank.linked, of_rank.silent, of_rank.full = True, False, False
        case "leave" | "join":
            of_rank.in_map = what == "join"
            ranks.on_map([member(each) for each in range(4) if known[each].in_map])
        case "silence" | "answer":
            of_rank.silent = what == "silence"
            ranks.on_silence(member(rank), silent=of_rank.silent)
        case "fill" | "free":
            of_rank.full = what == "fill"
            report(ranks, rank, free=0 if of_rank.full else 1000)


@every_policy
@given(events=st.lists(changes, max_size=24), seed=st.integers(0, 7), avoided=st.integers(0, 4))
def test_a_dead_rank_is_never_chosen_and_the_fittest_always(
    policy: str, events: list[tuple[str, int]], seed: int, avoided: int
) -> None:
    ranks, known = chooser(policy, seed=seed), [Fitness() for _ in range(4)]
    for what, rank in events:
        change(ranks, known, what, rank)
        chosen = ranks.choose(PROMPT, avoid=[member(avoided)], backup_rank=RankId(rank))
        live = [each for each in range(4) if known[each].live]
        if not live:
            assert chosen is None
            continue
        assert chosen is not None
        unfitness = {r: (known[r].silent, r == avoided, known[r].full) for r in live}
        assert unfitness[chosen.rank] == min(unfitness.values())


@every_policy
@given(backup=st.integers(0, 3), seed=st.integers(0, 7), others=st.integers(0, 12))
def test_a_moved_session_goes_to_its_backup_rank(
    policy: str, backup: int, seed: int, others: int
) -> None:
    """Its replicas outweigh what an ordinary share of other sessions weighs."""
    ranks = chooser(policy, seed=seed)
    for number in range(others):
        place(ranks, (number, *PROMPT[:BLOCK]))
    assert place(ranks, tuple(range(500, 500 + 40 * BLOCK)), backup) == backup


@every_policy
def test_a_dead_backup_rank_is_not_waited_for(policy: str) -> None:
    ranks = chooser(policy)
    ranks.on_link_broken(member(2))
    assert place(ranks, PROMPT, 2) != 2


@every_policy
def test_a_burst_is_spread(policy: str) -> None:
    ranks = chooser(policy)
    chosen = Counter(place(ranks, (number, *PROMPT)) for number in range(40))
    assert min(chosen[rank] for rank in range(4)) >= 5


@pytest.mark.parametrize(
    ("policy", "follows"),
    [("prefix-affinity", True), ("least-tokens", False), ("round-robin", False)],
)
def test_who_sends_a_prompt_to_where_it_is_cached(policy: str, follows: bool) -> None:
    ranks = chooser(policy)
    first = place(ranks, PROMPT)
    assert (place(ranks, PROMPT) == first) is follows


@pytest.mark.parametrize("policy", ["prefix-affinity", "least-tokens"])
def test_least_work(policy: str) -> None:
    ranks = chooser(policy)
    for rank, tokens in enumerate((900, 800, 100, 700)):
        report(ranks, rank, tokens=tokens)
    assert place(ranks, PROMPT) == 2


def test_power_of_two_never_takes_the_busiest_and_spreads_over_the_others() -> None:
    ranks = chooser("power-of-two")
    for rank in range(4):
        report(ranks, rank, tokens=100_000 if rank == 1 else 0)
    chosen = Counter(place(ranks, (number, *PROMPT)) for number in range(60))
    assert set(chosen) == {0, 2, 3}


def test_round_robin_goes_on_after_the_last_one_and_skips_the_dead() -> None:
    ranks = chooser("round-robin")
    report(ranks, 1, tokens=100_000)  # it does not look
    assert [place(ranks, PROMPT) for _ in range(5)] == [0, 1, 2, 3, 0]
    ranks.on_link_broken(member(1))
    assert [place(ranks, PROMPT) for _ in range(3)] == [2, 3, 0]


def test_an_unknown_policy() -> None:
    with pytest.raises(ValueError, match="fastest"):
        routing_policy("fastest", random.Random())
