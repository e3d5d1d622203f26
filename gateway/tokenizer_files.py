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

_USUAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Names of special tokens that every model may have."""

_EXTRA, _OWN = "extra_special_tokens", "model_specific_special_tokens"
_TOKEN_TYPE = "AddedToken"

_CLEANS_UP = "clean_up_tokenization_spaces"
_EVEN_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
"""With both, transformers takes out spaces before punctuation. The first alone does nothing."""

_OTHER_FORMATS = ("tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """`tokenizer` neither truncates nor pads. `plain` is tokenizer.json as it is. `names` are the
    texts of the special tokens by name (`eos_token`, or a name of the model's own)."""

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
    config = read_config(folder)
    if tokenizer.padding is not None:
        config.setdefault("pad_token", tokenizer.padding["pad_token"])
    # What was saved is the setting of whoever trained it. Limits are the gateway's.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if config.get(_CLEANS_UP) and config.get(_EVEN_BPE):
        raise CheckpointError(f"{folder / CONFIG_FILE} has {_EVEN_BPE}, which is not served")
    tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
    try:
        named = _named_tokens(config)
        tokenizer.add_tokens(list(_tokens_to_add(folder, tokenizer, plain, config, named)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: malformed added tokens: {error}") from error
    names = {name: _text(token) for name, token in named.items()}
    return TokenizerFiles(tokenizer=tokenizer, plain=plain, config=config, names=names)


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; without tokens in it, special_tokens_map.json counts, too. Names of
    the model's own for special tokens are in `model_specific_special_tokens`. Raises
    CheckpointError."""
    config = _optional_json(folder, CONFIG_FILE)
    own = [key for key in config if _is_own_name(key) and isinstance(config[key], str)]
    if own or isinstance(config.get(_EXTRA), Mapping):
        config[_OWN] = {key: config.pop(key) for key in own}
    config = _with_own_names(config)
    if "added_tokens_decoder" in config:
        return config
    older = _optional_json(folder, "special_tokens_map.json")
    older = {key: _as_token(value) for key, value in older.items()}
    first, more = config.get(_EXTRA) or [], older.get(_EXTRA)
    if isinstance(more, list):
        older[_EXTRA] = [*first, *(token for token in more if token not in first)]
    return _with_own_names(config | older)


def _with_own_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A dict of extra tokens names them."""
    extra = config.get(_EXTRA)
    if not isinstance(extra, Mapping):
        return dict(config)
    rest = {key: value for key, value in config.items() if key != _EXTRA}
    return rest | {_OWN: {**config.get(_OWN, {}), **extra}}


def _as_token(value: Any) -> Any:
    """special_tokens_map.json does not say the type of an object."""
    is_token = isinstance(value, Mapping) and "content" in value
    return {"__type": _TOKEN_TYPE, **value} if is_token else value


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
    """Those that every model may have, then the model's own: each key that ends with `_token` and
    whose value is one."""
    named = {key: config[key] for key in _USUAL if config.get(key) is not None}
    own = [key for key in config if _is_own_name(key) and _is_token(config[key])]
    named |= {key: config[key] for key in own}
    named |= config.get(_OWN) or {}
    for key, token in named.items():
        _check_token(key, token)
    return named


def _is_own_name(key: str) -> bool:
    return key.endswith("_token") and key not in _USUAL


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, Mapping) and value.get("__type") == _TOKEN_TYPE
    )


def _check_token(key: str, token: Any) -> None:
    """Raises TypeError."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str):
        raise TypeError(f"{key} is {token!r:.60}, which is no token")


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
        if not all(isinstance(entry, Mapping) for entry in declared.values()):
            raise TypeError("added_tokens_decoder must hold objects")
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
    extra = config.get(_EXTRA) or config.get("additional_special_tokens") or []
    for token in extra:
        _check_token(_EXTRA, token)
    return list(extra)


def _added_token(entry: Any, *, special: bool = False) -> AddedToken:
    if not isinstance(entry, Mapping):
        return AddedToken(str(entry), special=special)
    fields = {key: value for key, value in entry.items() if key not in ("__type", "content")}
    return AddedToken(entry["content"], **({"special": special} | fields))
