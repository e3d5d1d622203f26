"""Turns unpacked packages into training data: clean, drop duplicates, split by document, tokenise.

It fetches nothing. `README.md` says how to unpack the packages of `sources.py` into one folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import chat
import numpy as np
from cleaning import clean, digest
from sources import SOURCES, Source, folder
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCAB_SIZE = 4096
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HELD_OUT_ONE_IN = 100
HELD_OUT_ONE_IN_LONG = 30  # chapters: fewer and longer, so a larger share
LONG_CHARS = 2000
SHIPPED_HELD_OUT_BYTES = 96_000
# The pre-tokenizer of the Qwen family: words with their leading space, digits one by one.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def documents(source: Source, root: Path, seen: set[int]) -> list[str]:
    """The source's documents, each once, in an order that depends on their contents only."""
    kept: dict[int, str] = {}
    for text in map(clean, source.read(root / folder(source))):
        key = digest(text)
        if len(text) > 20 and key not in seen:
            seen.add(key)
            kept[key] = text
    ordered = [kept[key] for key in sorted(kept)]
    if source.chars_max is None:
        return ordered
    total = np.cumsum([len(text) for text in ordered])
    return ordered[: int(np.searchsorted(total, source.chars_max))]


def is_held_out(text: str) -> bool:
    one_in = HELD_OUT_ONE_IN_LONG if len(text) > LONG_CHARS else HELD_OUT_ONE_IN
    return bool(digest(text) // 4 % one_in == 0)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenise(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    end = tokenizer.token_to_id(SPECIAL[0])
    ids: list[int] = []
    for start in range(0, len(texts), 1000):
        for encoding in tokenizer.encode_batch(texts[start : start + 1000]):
            ids += [*encoding.ids, end]
    return np.array(ids, dtype=np.uint16)


def shipped(held_out: dict[str, list[str]]) -> list[dict[str, str]]:
    """A small share of every source's held-out text, for an evaluation through a server."""
    rows: list[dict[str, str]] = []
    budget = SHIPPED_HELD_OUT_BYTES // len(held_out)
    for name, texts in held_out.items():
        used = 0
        for text in texts:
            text = text[:3000]
            if used and used + len(text.encode()) > budget:
                break
            used += len(text.encode())
            rows.append({"source": name, "text": text})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="a folder per package")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    seen: set[int] = set()
    train: dict[str, list[str]] = {}
    held_out: dict[str, list[str]] = {}
    for source in SOURCES:
        texts = documents(source, args.packages, seen)
        held_out[source.name] = [t for t in texts if is_held_out(t)]
        train[source.name] = [t for t in texts if t not in set(held_out[source.name])]
    sample = [t for texts in train.values() for t in texts if digest(t) % 4 == 1]
    tokenizer = train_tokenizer(sample)
    tokenizer.save(str(args.out / "tokenizer.json"))

    meta: dict[str, list[dict[str, object]]] = {"train": [], "held_out": []}
    for split, by_source in (("train", train), ("held_out", held_out)):
        parts, at = [], 0
        for source in SOURCES:
            texts = by_source[source.name]
            ids = tokenise(tokenizer, texts)
            num_bytes = sum(len(t.encode()) for t in texts)
            meta[split].append(
                {"name": source.name, "start": at, "end": at + len(ids), "weight": source.weight,
                 "num_bytes": num_bytes, "num_documents": len(texts)}
            )  # fmt: skip
            parts.append(ids)
            at += len(ids)
            print(
                f"{split:9}{source.name:12}{len(texts):8} documents "
                f"{num_bytes:11} bytes {len(ids):10} tokens"
            )
        np.concatenate(parts).tofile(args.out / f"{split}.bin")
    rows = shipped(held_out)
    (args.out / "heldout.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    )

    ids = chat.rows(tokenizer, args.packages, train)
    ids.tofile(args.out / "chat.bin")
    mark = tokenizer.encode(chat.ANSWER_MARK).ids
    meta["chat"] = [{"row_tokens": chat.ROW_TOKENS, "rows": len(ids), "answer_mark": mark}]
    (args.out / "meta.json").write_text(json.dumps(meta, indent=1))
    print(f"chat: {len(ids)} rows of {chat.ROW_TOKENS} tokens")


if __name__ == "__main__":
    main()
