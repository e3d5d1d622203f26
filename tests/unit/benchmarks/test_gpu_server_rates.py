"""The steady window of streams that begin together, and the bytes that a step cannot do without."""

from __future__ import annotations

import math

import pytest

from benchmarks.gpu_serve_load import Arrival
from benchmarks.gpu_server import rank_options
from benchmarks.gpu_server_rates import (
    CardSharing,
    Round,
    distinct_experts,
    server_row,
    steady_window,
    step_bytes,
    table,
)
from benchmarks.gpu_shapes import qwen3_30b
from cli.bench.stream_client import StreamRecord
from gpu_worker.config import RankConfig
from gpu_worker.step_sizes import with_step_sizes
from shared.config import load_config

SIZES = qwen3_30b(48)


def stream(*moments: float, num_tokens: int = 1) -> list[Arrival]:
    return [Arrival(at=at, num_tokens=num_tokens) for at in moments]


def round_of(*streams: list[Arrival], error: str | None = None) -> Round:
    records = [
        StreamRecord(sent_at=0.0, arrivals=[a.at for a in each], error=error) for each in streams
    ]
    return Round(records=records, streams=streams)


def test_what_comes_while_others_wait_or_have_ended_does_not_count() -> None:
    early, late = stream(1.0, 2.0, 3.0, 4.0, 5.0), stream(3.0, 4.0, 5.0, 6.0, 7.0)
    found = steady_window([early, late])
    assert found is not None
    assert (found.seconds, found.num_tokens) == (2.0, 4)
    assert found.emitted == pytest.approx((3 + 1 + 5 + 3) / 4)


def test_several_tokens_of_a_chunk_all_count() -> None:
    found = steady_window([stream(1.0, 2.0, 3.0, num_tokens=3)])
    assert found is not None
    assert (found.seconds, found.num_tokens, found.emitted) == (2.0, 6, 6.0)


@pytest.mark.parametrize(
    "streams",
    [[], [[]], [stream(1.0, 2.0), []], [stream(1.0, 2.0), stream(2.0, 3.0)], [stream(1.0)]],
)
def test_without_a_moment_of_all_there_is_no_window(streams: list[list[Arrival]]) -> None:
    assert steady_window(streams) is None


def test_one_token_chooses_top_k_experts_and_many_choose_all() -> None:
    assert distinct_experts(128, 8, 1) == pytest.approx(8)
    assert distinct_experts(128, 8, 2) == pytest.approx(8 + 8 * (1 - 8 / 128))
    assert distinct_experts(128, 8, 4096) == pytest.approx(128)


def test_one_rank_reads_its_shared_weights_chosen_experts_and_kv() -> None:
    alone = step_bytes(SIZES, CardSharing(ranks=1, cards=1), batch=1, context=0)
    assert alone == pytest.approx(
        2 * (8 * 48 * SIZES.num_expert_weights + SIZES.num_shared_weights)
    )
    with_kv = step_bytes(SIZES, CardSharing(ranks=1, cards=1), batch=1, context=100)
    assert with_kv - alone == pytest.approx(2 * 100 * 48 * 2 * 4 * 128)


def test_ranks_of_one_card_read_shared_weights_each_and_a_chosen_expert_once() -> None:
    found = step_bytes(SIZES, CardSharing(ranks=2, cards=1), batch=8, context=300)
    experts = distinct_experts(128, 8, 16) * 48 * SIZES.num_expert_weights
    own = SIZES.num_shared_weights + 8 * 300 * SIZES.kv_values_per_token
    assert found == pytest.approx(2 * (experts + 2 * own))


@pytest.mark.parametrize(
    ("ranks", "cards", "of_a_card"), [(1, 4, 1), (2, 2, 1), (3, 2, 2), (8, 4, 2), (2, 1, 2)]
)
def test_the_card_with_most_ranks_sets_the_floor(ranks: int, cards: int, of_a_card: int) -> None:
    shared = CardSharing(ranks=ranks, cards=cards)
    assert shared.of_a_card == of_a_card
    whole = step_bytes(SIZES, CardSharing(ranks=ranks, cards=1), batch=4, context=64)
    assert step_bytes(SIZES, shared, batch=4, context=64) == pytest.approx(
        whole * of_a_card / ranks
    )


def test_a_row_pools_its_rounds_and_knows_its_share() -> None:
    rounds = [round_of(stream(1.0, 1.5, 2.0)), round_of(stream(1.0, 2.0, 4.0))]
    row = server_row(
        rounds,
        CardSharing(ranks=1, cards=1),
        batch=1,
        prompt_tokens=64,
        sizes=SIZES,
        copy_tb_per_s=4.0,
    )
    assert row.tokens_per_s == 4 / 4.0
    assert row.step_ms == 1000.0
    assert row.context == 66
    assert row.itl_ms.max == 2000.0
    assert row.floor is not None
    nbytes = step_bytes(SIZES, CardSharing(ranks=1, cards=1), batch=1, context=66)
    assert row.floor.gigabytes == pytest.approx(nbytes / 1e9)
    assert row.floor.share == pytest.approx(nbytes / 4e12 / 1.0)
    assert len(table([row]).splitlines()) == 2


def test_a_failed_stream_leaves_no_rate_but_its_words() -> None:
    rounds = [round_of(stream(1.0, 2.0)), round_of(stream(1.0), error="broke off")]
    row = server_row(
        rounds,
        CardSharing(ranks=1, cards=1),
        batch=1,
        prompt_tokens=8,
        sizes=SIZES,
        copy_tb_per_s=4.0,
    )
    assert (row.tokens_per_s, row.step_ms, row.floor) == (None, None, None)
    assert row.errors == ("broke off",)
    assert "1 failed: broke off" in table([row])
    assert not math.isnan(row.ttft_ms.p50)


@pytest.mark.parametrize(("batch", "prompt", "new"), [(128, 64, 192), (1, 16, 2), (300, 4000, 96)])
def test_ranks_have_room_for_the_largest_batch(batch: int, prompt: int, new: int) -> None:
    config = load_config(
        RankConfig,
        section="rank",
        file=None,
        environ={
            f"STARFISH_RANK_{name.upper()}": value
            for name, value in rank_options(batch, prompt, new).items()
        },
        flags={},
    )
    assert config.running_max == batch
    assert config.kv_tokens >= batch * (prompt + new)
    for num_ranks in (1, 4):
        sized = with_step_sizes(config, on_card=True, num_ranks=num_ranks)
        assert sized.step_tokens_max - batch >= min(batch, sized.prefill_chunk_tokens)
