"""Sizes of steps by device, and what the user has said."""

from __future__ import annotations

import pytest

from gpu_worker.config import RankConfig
from gpu_worker.step_sizes import tokens_max_of_exchange, with_step_sizes
from shared.errors import ConfigError


def sizes(*, on_card: bool, num_ranks: int = 1, **given: int) -> tuple[int, int, int]:
    config = with_step_sizes(RankConfig(**given), on_card=on_card, num_ranks=num_ranks)  # type: ignore[arg-type]
    return config.step_tokens_max, config.prefill_chunk_tokens, config.mixed_prefill_tokens


def test_a_card_alone_takes_a_long_prompt_whole_and_other_ranks_small_chunks() -> None:
    assert sizes(on_card=True) == (4096, 4096, 512)
    assert sizes(on_card=True, num_ranks=2) == (192, 128, 0)
    assert sizes(on_card=False) == (192, 128, 0)


def test_what_the_user_says_holds() -> None:
    assert sizes(on_card=True, prefill_chunk_tokens=8192) == (8192, 8192, 512)
    assert sizes(on_card=True, step_tokens_max=1024) == (1024, 1024, 512)
    assert sizes(on_card=False, step_tokens_max=64) == (64, 64, 0)
    assert sizes(on_card=True, mixed_prefill_tokens=64)[2] == 64


def test_only_steps_of_cpus_are_so_short_that_one_client_must_not_fill_them() -> None:
    def of(*, on_card: bool, **given: int) -> int:
        config = RankConfig(**given)  # type: ignore[arg-type]
        return with_step_sizes(config, on_card=on_card, num_ranks=2).tenant_step_tokens

    assert of(on_card=True) == -1
    assert of(on_card=False) == 4
    assert of(on_card=True, tenant_step_tokens=64) == 64
    assert of(on_card=False, tenant_step_tokens=-1) == -1


def test_where_a_card_draws_tokens_those_of_the_host_are_few() -> None:
    def of(*, on_card: bool, **given: int) -> int:
        config = RankConfig(**given)  # type: ignore[arg-type]
        return with_step_sizes(config, on_card=on_card, num_ranks=2).tenant_host_rows

    assert of(on_card=True) == 4
    assert of(on_card=False) == 64
    assert of(on_card=True, tenant_host_rows=-1) == -1


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"prefill_chunk_tokens": 512}, "--prefill-chunk-tokens 512"),
        ({"running_max": 500}, "--running-max"),
    ],
)
def test_what_contradicts_a_default_is_refused(given: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        sizes(on_card=False, **given)


def test_sequences_of_a_step_grow_with_what_may_run_and_not_with_its_tokens() -> None:
    config = with_step_sizes(RankConfig(), on_card=True, num_ranks=1)
    assert config.step_sequences_max == 192
    assert RankConfig(running_max=512, step_tokens_max=1024).step_sequences_max == 512


def test_cards_with_peers_take_the_steps_that_their_buffers_have_room_for() -> None:
    h200, qwen3_30b, v32 = 150 * 10**9, (2048, 256), (7168, 512)
    assert tokens_max_of_exchange(*qwen3_30b, h200, 1) == 512
    assert tokens_max_of_exchange(*v32, h200, 1) == 256
    assert tokens_max_of_exchange(*v32, 80 * 10**9, 1) == 192
    assert tokens_max_of_exchange(*v32, h200, 4) == 192


def test_large_steps_of_cards_with_peers_have_few_tokens_of_prompts_beside_decodes() -> None:
    def of(**given: int) -> tuple[int, int, int]:
        config = with_step_sizes(RankConfig(**given), on_card=True, num_ranks=2, tokens_max=512)  # type: ignore[arg-type]
        return config.step_tokens_max, config.prefill_chunk_tokens, config.mixed_prefill_tokens

    assert of() == (512, 512, 128)
    assert of(step_tokens_max=256) == (256, 256, 128)
    assert of(prefill_chunk_tokens=128, mixed_prefill_tokens=64) == (512, 128, 64)
