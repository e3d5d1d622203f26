"""Reads the tokenizer of a checkpoint from its files, as transformers does: tokenizer.json says how
texts become tokens, the other files add tokens and name the special ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer

from shared.errors import CheckpointError
from shared.model_spec import read_json

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Of the special tokens that have a name: `bos_token` and so on."""

_OTHER_FORMATS = ("tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """`tokenizer` neither truncates nor pads. `plain` is tokenizer.json as it is. `names` are the
    texts of the special tokens by name (`eos_token`)."""

    tokenizer: Tokenizer
    plain: Mapping[str, Any]
    config: Mapping[str, Any]
    names: Mapping[str, str]


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Blocks. Raises CheckpointError."""
    path = folder / TOKENIZER_FILE
    raw = _read(path)
    try:
        plain = msgspec.json.decode(raw, type=dict[str, Any])
        tokenizer = Tokenizer.from_buffer(raw)
    except Exception as error:
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    # What was saved is the setting of whoever trained it. Limits are the gateway's.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = read_config(folder)
    named = _named_tokens(config)
    try:
        tokenizer.add_tokens(list(_tokens_to_add(folder, tokenizer, plain, config, named)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: malformed added tokens: {error}") from error
    names = {name: _text(token) for name, token in named.items()}
    return TokenizerFiles(tokenizer=tokenizer, plain=plain, config=config, names=names)


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; without tokens in it, special_tokens_map.json counts, too. Raises
    CheckpointError."""
    config = _optional_json(folder, CONFIG_FILE)
    if "added_tokens_decoder" not in config:
        config |= _optional_json(folder, "special_tokens_map.json")
    return config


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        others = [name for name in _OTHER_FORMATS if (path.parent / name).exists()]
        if not others:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        raise CheckpointError(
            f"{path.parent} has {others[0]} but no {path.name}, which Starfish needs; make it with "
            "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        ) from error


def _optional_json(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder, name) if (folder / name).exists() else {}


def _named_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = (f"{name}_token" for name in _NAMES)
    return {key: config[key] for key in keys if config.get(key) is not None}


def _text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(token)


def _tokens_to_add(
    folder: Path,
    tokenizer: Tokenizer,
    plain: Mapping[str, Any],
    config: Mapping[str, Any],
    named: Mapping[str, Any],
) -> Iterator[AddedToken]:
    """Tokens that a file declares anew replace those of tokenizer.json, with their properties."""
    special = {_text(token) for token in named.values()}
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for _, token in sorted(_declared_tokens(folder, plain, config, special).items()):
        known.add(token.content)
        if token.content in special:
            token.special = True
        yield token
    for entry in (*named.values(), *_extra_tokens(config)):
        token = _added_token(entry, special=True)
        if token.content not in known:
            known.add(token.content)
            yield token


def _declared_tokens(
    folder: Path, plain: Mapping[str, Any], config: Mapping[str, Any], special: set[str]
) -> dict[int, AddedToken]:
    declared = config.get("added_tokens_decoder")
    if declared is not None:
        return {int(token_id): _added_token(entry) for token_id, entry in declared.items()}
    tokens = {
        int(token_id): AddedToken(text, normalized=text not in special, special=text in special)
        for text, token_id in _optional_json(folder, "added_tokens.json").items()
    }
    for entry in plain.get("added_tokens") or []:
        fields = {key: value for key, value in entry.items() if key != "id"}
        tokens[int(entry["id"])] = _added_token(fields)
    return tokens


def _extra_tokens(config: Mapping[str, Any]) -> list[Any]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return list(extra.values()) if isinstance(extra, Mapping) else list(extra)


def _added_token(entry: Any, *, special: bool = False) -> AddedToken:
    if not isinstance(entry, Mapping):
        return AddedToken(str(entry), special=special)
    fields = {key: value for key, value in entry.items() if key not in ("__type", "content")}
    return AddedToken(entry["content"], **({"special": special} | fields))
