"""Reads held-out texts as tokens to score."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from shared.errors import CheckpointError, ConfigError

HELD_OUT_FILE = "heldout.jsonl"
_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """All tokens but the first are scored; the first one only begins the text."""

    tokens: tuple[int, ...]
    num_bytes: int  # of the text in UTF-8


def read_documents(path: Path, model: Path, context_tokens_max: int) -> list[Document]:
    """Each line is a JSON object with a `text`, which is cut to the context and scored by itself.
    Raises ConfigError, CheckpointError."""
    tokenizer = _open_tokenizer(model)
    first = _bos_token(model, tokenizer)
    documents = []
    for text in _texts(path):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        kept = ids[: context_tokens_max - len(first)]
        if len(kept) < len(ids):
            text = tokenizer.decode(kept, skip_special_tokens=False)
        if len(first) + len(kept) > 1:
            documents.append(Document(tokens=(*first, *kept), num_bytes=len(text.encode())))
    if not documents:
        raise ConfigError(f"{path} has no text to score; pass --documents FILE")
    return documents


def _texts(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; pass --documents FILE") from error
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line)["text"] if line.strip() else ""
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f'{path}:{number} must be {{"text": …}} in JSON: {error!r}'
            ) from error
        if text:
            yield str(text)


def _open_tokenizer(model: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(model / "tokenizer.json"))
    except Exception as error:
        raise CheckpointError(f"cannot read {model / 'tokenizer.json'}: {error}") from error


def _bos_token(model: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token before every text in training: the model's BOS, or `<|endoftext|>`."""
    try:
        config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {model / 'config.json'}: {error}") from error
    token = config.get("bos_token_id")
    if not isinstance(token, int):
        token = tokenizer.token_to_id(_END_OF_TEXT)
    return () if token is None else (token,)
