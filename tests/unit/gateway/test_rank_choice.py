"""The choice of a rank: the least work decides, and a silent rank comes last."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.rank_choice import RankChooser
from gateway.routing_policy import CACHED_TOKEN_WEIGHT
from shared.types import Incarnation, Member, RankId
from shared.wire import LatePeer, Load

PROMPT = tuple(range(100))


def member(rank: int) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(1))


def load(*, tokens: int = 0, running: int = 0, waiting: int = 0, free: int = 1000) -> Load:
    return Load(
        running=running, waiting=waiting, tokens=tokens, kv_blocks_free=free, kv_blocks=1000
    )


def router(num_ranks: int = 3) -> RankChooser:
    result = RankChooser()
    result.on_map([member(rank) for rank in range(num_ranks)])
    for rank in range(num_ranks):
        result.on_link_opened(member(rank), kv_block_tokens=16)
    return result


def place(ranks: RankChooser, prompt: tuple[int, ...]) -> Member:
    chosen = ranks.choose(prompt)
    assert chosen is not None
    ranks.add(chosen, sessions=1, tokens=len(prompt))
    return chosen


def test_nobody_lives_before_a_map_and_a_link() -> None:
    ranks = RankChooser()
    ranks.on_link_opened(member(0), kv_block_tokens=16)
    assert ranks.choose(PROMPT) is None
    ranks.on_map([member(0), member(1)])
    assert ranks.live() == [member(0)]
    ranks.on_link_broken(member(0))
    assert ranks.choose(PROMPT) is None


def test_a_burst_is_spread_before_any_rank_reports() -> None:
    ranks = router(3)
    chosen = [place(ranks, (n, *PROMPT)) for n in range(9)]
    assert {chosen.count(member(rank)) for rank in range(3)} == {3}


def test_equal_prompts_are_spread_too() -> None:
    ranks = router(3)
    chosen = [place(ranks, PROMPT) for _ in range(9)]
    assert {chosen.count(member(rank)) for rank in range(3)} == {3}


def test_the_load_of_other_gateways_counts() -> None:
    ranks = router(2)
    ranks.on_load(member(0), load(tokens=5000, running=9))
    assert ranks.choose(PROMPT) == member(1)


def test_own_sessions_are_not_counted_twice_when_the_rank_reports_them() -> None:
    ranks = router(2)
    ranks.add(member(0), sessions=1, tokens=500)
    ranks.on_load(member(0), load(tokens=500, running=1))
    ranks.add(member(1), sessions=1, tokens=600)
    assert ranks.choose(PROMPT) == member(0)


def test_a_rank_without_room_for_the_prompt_comes_after_those_with_room() -> None:
    ranks = router(2)
    ranks.on_load(member(0), load(free=2))
    ranks.on_load(member(1), load(tokens=9000, running=50))
    assert ranks.choose(PROMPT) == member(1)
    assert ranks.choose(PROMPT[:20]) == member(0)


def test_a_silent_rank_attracts_nothing_while_another_lives() -> None:
    ranks = router(2)
    ranks.on_silence(member(0), silent=True)
    ranks.on_load(member(1), load(tokens=10**6, running=1000, free=0))
    assert ranks.choose(PROMPT) == member(1)
    ranks.on_silence(member(0), silent=False)
    assert ranks.choose(PROMPT) == member(0)


def test_a_rank_that_the_others_wait_for_gets_no_more() -> None:
    ranks = router(3)
    late = (LatePeer(rank=RankId(0), ms=78.0),)
    for rank in range(3):
        steps = replace(load(tokens=100 * rank), step_ms=100.0, late_peers=late if rank else ())
        ranks.on_load(member(rank), steps)
    assert ranks.stragglers() == {member(0): 78.0}
    assert ranks.choose(PROMPT) == member(1)
    ranks.on_link_broken(member(2))  # of two nobody can say who is slow
    assert ranks.stragglers() == {}
    assert ranks.choose(PROMPT[::-1]) == member(0)


def test_where_all_are_silent_one_is_taken_all_the_same() -> None:
    ranks = router(2)
    for rank in range(2):
        ranks.on_silence(member(rank), silent=True)
    assert ranks.choose(PROMPT) is not None


def test_a_drained_rank_gets_nothing_while_another_can_have_it() -> None:
    ranks = router(3)
    ranks.on_drains(frozenset({member(0)}))
    assert member(0) in ranks.live()
    for other in (1, 2):
        ranks.on_load(member(other), load(tokens=10**6, running=1000, free=0))
    assert ranks.choose(PROMPT, avoid=(member(1), member(2))) in (member(1), member(2))
    ranks.on_link_broken(member(1))
    ranks.on_silence(member(2), silent=True)
    assert ranks.choose(PROMPT) == member(0)
    ranks.on_silence(member(2), silent=False)
    ranks.on_drains(frozenset())
    assert ranks.choose(PROMPT) == member(0)


def test_who_refused_just_now_comes_last() -> None:
    ranks = router(2)
    ranks.add(member(1), sessions=50, tokens=10_000)
    assert ranks.choose(PROMPT, avoid=(member(0),)) == member(1)


def done(ranks: RankChooser, chosen: Member, prompt: tuple[int, ...]) -> None:
    ranks.add(chosen, sessions=-1, tokens=-len(prompt))


def test_a_prefix_returns_to_its_rank_as_long_as_its_cache_outweighs_the_load() -> None:
    ranks = router(2)
    assert place(ranks, PROMPT) == member(0)
    done(ranks, member(0), PROMPT)
    ranks.add(member(0), tokens=CACHED_TOKEN_WEIGHT * 96)
    assert ranks.choose(PROMPT) == member(0)
    assert ranks.choose((9, *PROMPT)) == member(1)
    ranks.add(member(0), tokens=1)
    assert ranks.choose(PROMPT) == member(1)


def test_the_longer_cached_prefix_wins() -> None:
    ranks = router(3)
    ranks.add(member(0), tokens=1)
    assert place(ranks, PROMPT[:40]) == member(1)
    assert place(ranks, (*PROMPT[:64], 7, 7)) == member(2)
    done(ranks, member(1), PROMPT[:40])
    done(ranks, member(2), PROMPT[:66])
    assert ranks.choose(PROMPT) == member(2)


def test_a_hot_prefix_spreads_and_overloads_nobody() -> None:
    ranks = router(4)
    hot = tuple(range(512))
    chosen = [place(ranks, (*hot, n)) for n in range(64)]
    counts = [chosen.count(member(rank)) for rank in range(4)]
    assert max(counts) - min(counts) <= 2
    assert chosen[0] == chosen[1] == member(0)


def test_choices_of_one_prompt_share_ranks() -> None:
    ranks = router(8)
    chosen = [place(ranks, tuple(range(512))) for _ in range(8)]
    assert len(set(chosen)) <= 4


def test_a_prefix_does_not_draw_where_there_is_no_room_or_only_silence() -> None:
    ranks = router(2)
    assert place(ranks, PROMPT) == member(0)
    done(ranks, member(0), PROMPT)
    ranks.on_load(member(0), load(free=2))
    assert ranks.choose(PROMPT) == member(1)
    ranks.on_load(member(0), load())
    ranks.on_silence(member(0), silent=True)
    assert ranks.choose(PROMPT) == member(1)


def lose(ranks: RankChooser, how: str) -> None:
    """Makes member 0 lose its cache; its link is open afterwards."""
    if how == "map":
        ranks.on_map([member(1)])
        ranks.on_map([member(0), member(1)])
    elif how == "link":
        ranks.on_link_broken(member(0))
        ranks.on_link_opened(member(0), kv_block_tokens=16)
    elif how == "forgotten":
        ranks.forget(member(0))
        ranks.on_link_opened(member(0), kv_block_tokens=16)
    else:
        ranks.on_load(member(0), replace(load(), prefix_tokens=100))


@pytest.mark.parametrize("how", ["map", "link", "forgotten", "cache is off"])
def test_what_a_lost_rank_served_is_forgotten(how: str) -> None:
    ranks = router(2)
    assert place(ranks, PROMPT) == member(0)
    done(ranks, member(0), PROMPT)
    lose(ranks, how)
    ranks.add(member(0), tokens=1)
    assert ranks.choose(PROMPT) == member(1)


def test_no_more_is_remembered_of_a_rank_than_it_can_hold() -> None:
    ranks = router(2)
    ranks.on_load(member(0), replace(load(), kv_blocks=6))
    assert place(ranks, PROMPT) == member(0)
    done(ranks, member(0), PROMPT)
    other = tuple(range(200, 300))
    ranks.add(member(1), sessions=9)
    assert place(ranks, other) == member(0)
    done(ranks, member(0), other)
    ranks.add(member(1), sessions=-9)
    ranks.add(member(0), tokens=1)
    assert ranks.choose(PROMPT) == member(1)


def test_the_same_history_gives_the_same_choice() -> None:
    histories = []
    for _ in range(2):
        ranks = router(4)
        chosen = []
        for n in range(40):
            chosen.append(place(ranks, (n % 5, *PROMPT[: n + 1])))
            if n % 7 == 0:
                ranks.on_load(member(n % 4), load(tokens=n * 10, running=n % 3))
        histories.append(chosen)
    assert histories[0] == histories[1]


def test_the_backup_rank_is_chosen_as_if_its_cache_held_all_full_blocks() -> None:
    ranks = router(3)
    tokens = PROMPT[:97]
    ranks.add(member(2), tokens=CACHED_TOKEN_WEIGHT * 96 - 1)
    assert ranks.choose(tokens, backup_rank=RankId(2)) == member(2)
    assert router(3).choose(tokens) == member(0)


def test_a_backup_rank_with_far_more_work_is_not_chosen() -> None:
    ranks = router(3)
    ranks.add(member(2), tokens=CACHED_TOKEN_WEIGHT * 96 + 1)
    assert ranks.choose(PROMPT, backup_rank=RankId(2)) == member(0)


def test_kv_replicas_of_the_last_token_save_nothing() -> None:
    """The last token is always computed, and with it its block."""
    ranks = router(2)
    ranks.add(member(1), tokens=CACHED_TOKEN_WEIGHT * 80 + 1)
    assert ranks.choose(PROMPT[:96], backup_rank=RankId(1)) == member(0)


def hinder(ranks: RankChooser, how: str) -> None:
    """Gives the rank `member(0)` a reason not to be chosen."""
    if how == "no link":
        ranks.on_link_broken(member(0))
    elif how == "left out":
        ranks.on_map([member(1)])
    elif how == "silent":
        ranks.on_silence(member(0), silent=True)
    else:
        ranks.on_load(member(0), load(free=2))


@pytest.mark.parametrize("how", ["no link", "left out", "silent", "no room"])
def test_kv_replicas_do_not_attract_sessions_to_an_unusable_rank(how: str) -> None:
    ranks = router(2)
    ranks.add(member(1), sessions=1, tokens=10)
    assert ranks.choose(PROMPT, backup_rank=RankId(0)) == member(0)
    hinder(ranks, how)
    assert ranks.choose(PROMPT, backup_rank=RankId(0)) == member(1)


def test_kv_replicas_do_not_attract_a_session_to_a_rank_that_refused_it() -> None:
    ranks = router(2)
    chosen = ranks.choose(PROMPT, avoid=(member(0),), backup_rank=RankId(0))
    assert chosen == member(1)
