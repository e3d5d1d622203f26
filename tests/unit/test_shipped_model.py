"""The checkpoint that ships: small enough for git, loadable as it is, read by its tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

MODEL = Path(__file__).parents[2] / "models/starling-14m"
TEXT = "Once upon a time, in 1623, the king's ship – “Victory” – came home.\n\n  Ça va?"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_is_small_enough_for_git() -> None:
    sizes = [path.stat().st_size for path in MODEL.rglob("*") if path.is_file()]
    assert sum(sizes) <= 30_000_000
    assert max(sizes) <= 12_000_000


def test_index_names_every_tensor_of_the_shards_once(model: Any) -> None:
    from safetensors import safe_open

    index = json.loads((MODEL / "model.safetensors.index.json").read_text())["weight_map"]
    found: dict[str, str] = {}
    for path in MODEL.glob("*.safetensors"):
        with safe_open(str(path), "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (not a dict)
                assert name not in found
                found[name] = path.name
                assert shard.get_tensor(name).dtype == torch.bfloat16
    assert found == index


def test_is_a_sparse_model_of_standard_features(model: Any) -> None:
    config = model.config
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert config.num_experts >= 32
    assert config.num_experts_per_tok < config.num_experts
    assert 8e6 <= sum(p.numel() for p in model.parameters()) <= 20e6


def test_logits_are_finite_and_it_knows_english_from_noise(
    model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    def bits_per_byte(text: str) -> float:
        ids = torch.tensor([[0, *tokenizer.encode(text)]])
        with torch.no_grad():
            logits = model(ids).logits
        assert torch.isfinite(logits).all()
        nats = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        return float(nats) / math.log(2) / len(text.encode())

    documents = [json.loads(line) for line in (MODEL / "heldout.jsonl").read_text().splitlines()]
    english = next(d["text"] for d in documents if d["source"] == "austen")[:1000]
    assert bits_per_byte(english) < 1.8
    assert bits_per_byte(english[::-1]) > 3.0


def test_tokenizer_gives_back_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert len(ids) < len(TEXT.encode())
    assert max(ids) < json.loads((MODEL / "config.json").read_text())["vocab_size"]


def test_special_tokens_are_one_id_each(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "<|endoftext|><|im_start|><|im_end|>"
    assert tokenizer.encode(text) == [0, 1, 2]
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == {0, 2}


def test_chat_template_renders_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "Define courage."},
        {"role": "assistant", "content": "Courage (noun): a quality of spirit."},
        {"role": "user", "content": "Thanks."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\nDefine courage.<|im_end|>\n"
        "<|im_start|>assistant\nCourage (noun): a quality of spirit.<|im_end|>\n"
        "<|im_start|>user\nThanks.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
