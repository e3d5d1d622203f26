"""Which card a rank gets: its turn, or one that is free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from node_agent.cards import Cards, count_cards
from shared.types import RankId


def card(cards: Cards, rank: int) -> int:
    flag, number = cards.take(RankId(rank))
    assert flag == "--cuda-device"
    return int(number)


def test_ranks_of_a_host_take_its_cards_in_turn_again_after_a_restart() -> None:
    cards = Cards(4)
    assert [card(cards, rank) for rank in (8, 9, 10, 11)] == [0, 1, 2, 3]
    cards.free(RankId(9))
    assert card(cards, 9) == 1
    assert card(cards, 9) == 1  # it does not stand in its own way


def test_a_rank_that_moved_here_gets_a_free_card_and_no_neighbours_one() -> None:
    cards = Cards(4)
    assert [card(cards, rank) for rank in (8, 9, 10)] == [0, 1, 2]
    assert card(cards, 1) == 3  # its turn would be 1
    cards.free(RankId(8))
    assert card(cards, 5) == 0


def test_without_a_free_card_it_shares_the_one_with_the_fewest_ranks() -> None:
    cards = Cards(2)
    assert [card(cards, rank) for rank in (0, 1, 2)] == [0, 1, 0]
    assert card(cards, 4) == 1  # 0 has two


def test_processes_of_an_earlier_agent_keep_theirs() -> None:
    cards = Cards(4)
    cards.adopt(RankId(8), ["python", "-m", "gpu_worker", "--rank", "8", "--cuda-device", "2"])
    cards.adopt(RankId(9), ["python", "-m", "gpu_worker", "--rank", "9"])  # of an older release
    assert card(cards, 5) != 1
    assert card(cards, 10) not in (1, 2)


@pytest.mark.parametrize(
    ("device", "flags", "environ", "expected"),
    [
        ("auto", (), {}, 3),
        ("cuda", (), {}, 3),
        ("cpu", (), {}, 0),
        ("auto", ("--cuda-device", "1"), {}, 0),
        ("auto", ("--cuda-device=1",), {}, 0),
        ("auto", (), {"STARFISH_RANK_CUDA_DEVICE": "1"}, 0),
        ("auto", (), {"CUDA_VISIBLE_DEVICES": "2, 5"}, 2),
        ("auto", (), {"CUDA_VISIBLE_DEVICES": ""}, 0),
        ("auto", (), {"CUDA_VISIBLE_DEVICES": "0,-1,2"}, 1),
    ],
)
def test_cards_that_ranks_see(
    tmp_path: Path, device: str, flags: tuple[str, ...], environ: Mapping[str, str], expected: int
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert count_cards(device, flags, environ, devices=tmp_path) == expected


def test_a_host_without_cards_tells_its_ranks_nothing() -> None:
    assert Cards(0).take(RankId(3)) == ()
