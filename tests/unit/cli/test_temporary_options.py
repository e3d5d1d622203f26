"""The flags and environment of an instance that a benchmark starts for itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.bench.temporary_options import TemporaryInstanceOptions
from shared.errors import ConfigError


def value_of(flags: list[str], flag: str) -> str:
    return flags[flags.index(flag) + 1]


def test_every_option_becomes_a_flag_of_up(tmp_path: Path) -> None:
    options = TemporaryInstanceOptions(
        model=tmp_path,
        ranks=2,
        device="cuda",
        redundant_experts=16,
        slots_per_rank=9,
        speculative_tokens=1,
        static=True,
    )
    flags = options.flags()
    assert value_of(flags, "--model") == str(tmp_path)
    assert value_of(flags, "--ranks") == "2"
    assert value_of(flags, "--device") == "cuda"
    assert value_of(flags, "--redundant-experts") == "16"
    assert value_of(flags, "--slots-per-rank") == "9"
    assert value_of(flags, "--speculative-tokens") == "1"
    assert "--static" in flags
    assert "--seeded" not in flags


def test_without_a_model_it_is_the_elastic_reference_size() -> None:
    flags = TemporaryInstanceOptions().flags()
    assert "--seeded" in flags
    assert "--speculative-tokens" not in flags
    assert "--model" not in flags
    assert "--static" not in flags


def test_options_of_ranks_go_by_their_environment() -> None:
    texts = ["kv_tokens=65536", "--running-max=128", "replicas=a=b"]
    assert TemporaryInstanceOptions(rank_options=texts).environment() == {
        "STARFISH_RANK_KV_TOKENS": "65536",
        "STARFISH_RANK_RUNNING_MAX": "128",
        "STARFISH_RANK_REPLICAS": "a=b",
    }


@pytest.mark.parametrize("text", ["kv_tokens", "kv_tokens=", "=5", ""])
def test_an_option_without_name_or_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--rank-option"):
        TemporaryInstanceOptions(rank_options=[text]).check()


def test_an_instance_without_cache_keeps_all_other_options() -> None:
    options = TemporaryInstanceOptions(ranks=2, rank_options=["kv_tokens=512", "prefix_cache=true"])
    assert options.without_cache().environment() == {
        "STARFISH_RANK_KV_TOKENS": "512",
        "STARFISH_RANK_PREFIX_CACHE": "false",
    }
    assert options.without_cache().ranks == 2
