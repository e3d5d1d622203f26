"""A small tokenizer as SentencePiece's become in tokenizer.json: BPE whose words begin with "▁" and
a token for each byte, in its older form (a normaliser puts the spaces) and its newer one."""

from __future__ import annotations

import itertools
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

WORDS = ("▁the", "▁star", "▁arm", "fish", "é", "ü", "▁▁")
LETTERS = "▁abcdefghijklmnopqrstuvwxyz.,!?<>|_\n\u00e9\u00fc"


def build_fallback_tokenizer(*, older: bool, prefix_space: bool = True) -> Tokenizer:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in (f"<0x{byte:02X}>" for byte in range(256)):
        vocab[token] = len(vocab)
    merges: list[tuple[str, str]] = []
    for letter in LETTERS:
        vocab.setdefault(letter, len(vocab))
    for word in WORDS:
        for left, right in itertools.accumulate(
            word[1:], lambda pair, letter: (pair[0] + pair[1], letter), initial=("", word[0])
        ):
            if left:
                vocab.setdefault(left + right, len(vocab))
                if (left, right) not in merges:
                    merges.append((left, right))
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix_space else []
    if older:
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="▁", prepend_scheme="first" if prefix_space else "never", split=False
        )
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix_space:
        parts.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer
