"""The seeded checkpoint is a standard Hugging Face folder, the same for the same seed, written
whole or not at all, and its text is worth comparing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from gpu_worker.model_tools.__main__ import main
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from gpu_worker.model_tools.seeded_configs import SEEDED_CONFIGS
from shared.model_spec import ARCHITECTURES, read_model_spec, with_drafts
from tests.unit.gpu_worker.cpu.runs import SMALL, open_ranks

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wie heißt du? 日本 🙂"},
]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes(small_checkpoint: Path, tmp_path: Path) -> None:
    create_seeded_checkpoint(tmp_path / "a", seed=7, mlp_only_layers=(1,), **SMALL)
    assert files(tmp_path / "a") == files(small_checkpoint)


def test_another_seed_gives_other_weights_and_the_same_tokenizer(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    create_seeded_checkpoint(tmp_path / "a", seed=8, mlp_only_layers=(1,), **SMALL)
    ours, theirs = files(tmp_path / "a"), files(small_checkpoint)
    differing = {name for name in ours if ours[name] != theirs[name]}
    assert differing == {name for name in ours if name.endswith(".safetensors")}
    assert len(differing) == 2


def test_the_default_sizes_are_the_ones_we_promise(tmp_path: Path) -> None:
    create_seeded_checkpoint(tmp_path / "m", num_hidden_layers=1, num_shards=3)
    spec = read_model_spec(tmp_path / "m")
    sizes = (spec.vocab_size, spec.hidden_size, spec.num_experts, spec.top_k)
    assert sizes == (4096, 256, 64, 8)
    assert (spec.moe_intermediate_size, spec.context_tokens_max) == (128, 4096)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 3
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert len(tokenizer) == 4096
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    assert list(spec.eos_token_ids) == ends
    assert len(tokenizer("The statement is executed when an exception occurs.").input_ids) < 16


@pytest.fixture(scope="module")
def tokenizer(small_checkpoint: Path):
    return AutoTokenizer.from_pretrained(small_checkpoint)


@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_any_text_round_trips_through_the_tokenizer(tokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < 300 for token in ids)


def test_the_chat_template_writes_chatml(tokenizer) -> None:
    text = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWie heißt du? 日本 🙂<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer(text).input_ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3


def test_transformers_reads_the_configs(small_checkpoint: Path, tokenizer) -> None:
    config = AutoConfig.from_pretrained(small_checkpoint)
    generation = GenerationConfig.from_pretrained(small_checkpoint)
    assert config.model_type == "qwen3_moe"
    assert config.rope_parameters["rope_theta"] == 10_000.0
    assert generation.eos_token_id == [299, 297]
    assert tokenizer.eos_token_id == 299


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_seeded_checkpoint(tmp_path / "m", on_progress=fail, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appeared_meanwhile_stays(tmp_path: Path) -> None:
    create_seeded_checkpoint(tmp_path / "m", seed=1, **SMALL)
    before = files(tmp_path / "m")
    create_seeded_checkpoint(tmp_path / "m", seed=2, **SMALL)
    assert files(tmp_path / "m") == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_of_other_things_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        create_seeded_checkpoint(tmp_path / "m", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_vocabulary_too_small_for_all_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocabulary of 200"):
        create_seeded_checkpoint(tmp_path / "m", **(SMALL | {"vocab_size": 200}))


def test_a_vocabulary_larger_than_the_manual_gives_is_filled(tmp_path: Path) -> None:
    create_seeded_checkpoint(tmp_path / "m", **(SMALL | {"vocab_size": 20_000}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert len(tokenizer) == 20_000
    assert tokenizer.eos_token_id == 19_999
    assert len({tokenizer.decode([token]) for token in range(15_000, 20_000)}) == 5_000
    text = tokenizer.decode([15_000])
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert 15_000 not in tokenizer(text).input_ids


@pytest.mark.slow
def test_greedy_text_does_not_fall_into_a_loop(tmp_path: Path) -> None:
    create_seeded_checkpoint(tmp_path / "m")
    (run,) = open_ranks(tmp_path / "m", 1, kv_blocks=16, block_tokens=16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    for prompt in ("Hello", "def f(x):", "1 2 3 4", "The quick brown fox"):
        emitted = run.greedy(tokenizer(prompt).input_ids, range(16), 96)
        assert len(set(emitted[-32:])) > 24


@pytest.mark.parametrize("family", sorted(set(SEEDED_CONFIGS) - {"qwen3_moe"}))
def test_the_command_writes_a_small_checkpoint_of_any_family(tmp_path: Path, family: str) -> None:
    """Whose greedy text is worth comparing, too, but for a prompt here and there."""
    folder = tmp_path / "m"
    assert main(["seed", "--family", family, "--dtype", "bfloat16", "--out", str(folder)]) == 0
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2**20
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spec = read_model_spec(folder)
    assert ARCHITECTURES[spec.architecture] == family
    assert tokenizer.eos_token_id in spec.eos_token_ids
    (run,) = open_ranks(folder, 1)
    assert run.model.weights_dtype == np.uint16
    distinct = [
        len(set(run.greedy(tokenizer(prompt).input_ids, range(32), 64)[-32:]))
        for prompt in ("Hello", "def f(x):", "1 2 3 4", "The quick brown fox")
    ]
    assert sorted(distinct)[1] > 12, distinct


@pytest.mark.parametrize("guesses", ["random", "good"])
def test_the_command_adds_a_layer_that_drafts(tmp_path: Path, guesses: str) -> None:
    arguments = ["seed", "--family", "glm4_moe", "--out", str(tmp_path / "m")]
    assert main([*arguments, "--guesses", guesses]) == 0
    assert with_drafts(read_model_spec(tmp_path / "m"), 1).draft_layers == (3,)
    tensors = load_file(tmp_path / "m" / "model-00002-of-00002.safetensors")
    tensors |= load_file(tmp_path / "m" / "model-00001-of-00002.safetensors")
    layer = "model.layers.3"
    for name, source in (
        (f"{layer}.embed_tokens.weight", "model.embed_tokens.weight"),
        (f"{layer}.shared_head.head.weight", "lm_head.weight"),
    ):
        assert np.array_equal(tensors[name], tensors[source])
    looks_at_context = bool(tensors[f"{layer}.self_attn.o_proj.weight"].any())
    assert looks_at_context is (guesses == "random")


def test_a_family_without_such_a_layer_gets_none(tmp_path: Path) -> None:
    arguments = ["seed", "--family", "mixtral", "--out", str(tmp_path / "m")]
    assert main([*arguments, "--guesses", "random"]) == 1
    assert not (tmp_path / "m").exists()


def test_a_checkpoint_of_another_family_is_not_taken_for_the_one_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["seed", "--out", str(tmp_path / "m"), "--family"]
    assert main([*arguments, "mixtral"]) == 0
    before = files(tmp_path / "m")
    assert main([*arguments, "mixtral"]) == 0
    assert main([*arguments, "olmoe"]) == 1
    assert "is a checkpoint of MixtralForCausalLM" in capsys.readouterr().err
    assert files(tmp_path / "m") == before


def test_the_command_writes_a_checkpoint_and_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["seed", "--out", str(tmp_path / "m"), "--seed", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "1611/1611"
    assert len(lines) <= 101
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 54_138_112
