"""The tokenizer of a seeded checkpoint: byte-level BPE trained on Python's own manual, with a
ChatML template. It is the same on every run of one Python version, and any text round-trips."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
_SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)

_CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def write_tokenizer(folder: Path, *, vocab_size: int, context_tokens: int) -> dict[str, int]:
    """Writes tokenizer.json and tokenizer_config.json with exactly `vocab_size` tokens. Returns the
    ids of the special tokens, which are the last ones."""
    special = {
        token: vocab_size - len(_SPECIAL_TOKENS) + n for n, token in enumerate(_SPECIAL_TOKENS)
    }
    tokenizer = _train(vocab_size - len(_SPECIAL_TOKENS))
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    if {token: tokenizer.token_to_id(token) for token in special} != special:
        raise ValueError(f"a vocabulary of {vocab_size} tokens is too small; choose 259 or more")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_tokens,
        "additional_special_tokens": [START_OF_TURN, END_OF_TURN],
        "chat_template": _CHAT_TEMPLATE,
    }
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return special


def _train(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=sorted(ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)], trainer=trainer)
    return _filled(tokenizer, vocab_size)


def _filled(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Adds unused tokens up to `vocab_size`: the manual yields only some 10,000. They decode to a
    text, but no text encodes to them."""
    num_trained = tokenizer.get_vocab_size()
    if num_trained >= vocab_size:
        return tokenizer
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"] |= {f"<unused{n}>": n for n in range(num_trained, vocab_size)}
    return Tokenizer.from_str(json.dumps(state))
