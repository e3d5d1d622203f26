"""The configuration and the spec that follows from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from control_plane.config import ControlPlaneConfig, instance_spec
from control_plane.spec_publisher import difference
from gpu_worker.model_tools.seeded_configs import SEEDED_CONFIGS
from shared.config import Timings
from shared.errors import ConfigError
from shared.model_spec import ModelSpec, read_model_spec, with_drafts

MODEL = ModelSpec(
    architecture="Qwen3MoeForCausalLM",
    num_layers=8,
    moe_layers=tuple(range(8)),
    hidden_size=256,
    num_experts=64,
    top_k=8,
    moe_intermediate_size=128,
    vocab_size=4096,
    context_tokens_max=2048,
    eos_token_ids=(0,),
    raw={},
)
CONFIG = ControlPlaneConfig(model=Path("/models/tiny"))


@pytest.mark.parametrize(
    ("ranks", "redundant", "slots", "expected"),
    [
        (4, -1, 0, (64, 32)),  # a second replica of each expert
        (4, 16, 0, (16, 32)),  # half of the ranks hold all
        (5, -1, 0, (64, 26)),
        (1, -1, 0, (0, 64)),  # a second replica on the same rank is of no use
        (4, 0, 16, (0, 16)),
        (8, 64, 20, (64, 20)),
    ],
)
def test_slots_follow_from_ranks_and_redundancy(
    ranks: int, redundant: int, slots: int, expected: tuple[int, int]
) -> None:
    config = replace(CONFIG, ranks=ranks, redundant_experts=redundant, slots_per_rank=slots)
    spec = instance_spec(config, MODEL)
    assert (spec.redundant_experts, spec.slots_per_rank) == expected
    assert spec.model_name == "tiny"


def test_a_layer_that_drafts_has_experts_of_its_own(tmp_path: Path) -> None:
    config = SEEDED_CONFIGS["glm4_moe"] | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = read_model_spec(tmp_path)
    control_plane = replace(CONFIG, model=tmp_path)
    spec = instance_spec(control_plane, plain)
    assert (spec.num_moe_layers, spec.speculative_tokens) == (2, 0)
    control_plane = replace(control_plane, speculative_tokens=1)
    spec = instance_spec(control_plane, with_drafts(plain, 1))
    assert (spec.num_moe_layers, spec.speculative_tokens) == (3, 1)


def test_too_few_slots_say_how_many_are_needed() -> None:
    config = replace(CONFIG, slots_per_rank=15)
    with pytest.raises(ConfigError, match=r"--slots-per-rank 16 or more$"):
        instance_spec(config, MODEL)


def test_too_much_redundancy_says_what_would_fit_it() -> None:
    config = replace(CONFIG, slots_per_rank=16, redundant_experts=8)
    with pytest.raises(ConfigError, match=r"--slots-per-rank 18 or more"):
        instance_spec(config, MODEL)


def test_an_instance_may_serve_less_context_than_the_model_was_made_for_but_not_more() -> None:
    assert instance_spec(CONFIG, MODEL).context_tokens_max == 2048
    assert instance_spec(replace(CONFIG, context_tokens_max=512), MODEL).context_tokens_max == 512
    with pytest.raises(ConfigError, match="2048"):
        instance_spec(replace(CONFIG, context_tokens_max=4096), MODEL)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model": None}, "--model is missing"),
        ({"ranks": 0}, "at least one rank"),
        ({"redundant_experts": -2}, "must not be negative"),
        ({"slots_per_rank": -1}, "must not be negative"),
        ({"speculative_tokens": 2}, "--speculative-tokens 2"),
        ({"leader_ttl_s": 0.5}, "at least 1"),
        ({"urgent_probe_interval_ms": 400.0}, "half of the suspicion window"),
        ({"probe_interval_ms": 10.0}, "under the urgent interval"),
        ({"timings": Timings(suspicion_window_ms=20.0)}, "timings must satisfy"),
    ],
)
def test_impossible_values_are_refused(changed: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        replace(CONFIG, **changed).check()  # type: ignore[arg-type]


def test_the_defaults_are_possible() -> None:
    CONFIG.check()


def test_a_difference_of_specs_names_the_field() -> None:
    spec = instance_spec(CONFIG, MODEL)
    assert difference(spec, replace(spec, num_ranks=5)) == "num_ranks 4, not 5,"
