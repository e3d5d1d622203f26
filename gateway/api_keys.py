"""The API keys that a gateway knows, and what each may do: read from TOML text and from entries of
the environment. Where the text comes from, `api_key_watch` decides."""

from __future__ import annotations

import hmac
import tomllib
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from shared.api_key import (
    HASH_PREFIX,
    KEY_CHARACTERS_MIN,
    check_key_name,
    digest_in,
    digest_of,
)
from shared.errors import ConfigError
from shared.types import PRIORITY_MAX, WEIGHT_MAX, WEIGHT_MIN

KEYS_MAX = 10_000
_PREFIX_BYTES = 8
_Limit = Annotated[int, msgspec.Meta(ge=1)] | None
_Priority = Annotated[int, msgspec.Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)]


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a key may have; None: no limit of its own. Rates are per minute, the others in flight.
    `tokens_*` count prompts and `max_tokens` of every choice."""

    requests_per_minute: _Limit = None
    tokens_per_minute: _Limit = None
    requests_max: _Limit = None
    choices_max: _Limit = None
    tokens_max: _Limit = None


class _Entry(KeyLimits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table `[keys.NAME]`. Fields that are left out come from `[defaults]`."""

    hash: str | list[str] = []
    weight: Annotated[float, msgspec.Meta(ge=WEIGHT_MIN, le=WEIGHT_MAX)] = 1.0
    priority: _Priority = 0
    priority_min: _Priority | None = None
    reads_metrics: bool = False


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: dict[str, dict[str, Any]]
    defaults: dict[str, Any] = {}


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A client. `name` is "" for the one client of a gateway without keys. A request without a
    priority has `priority`; none may have one below `priority_min` (lower is more urgent)."""

    name: str
    limits: KeyLimits = KeyLimits()
    weight: float = 1.0
    priority: int = 0
    priority_min: int = 0
    reads_metrics: bool = False


ANYBODY = ApiKey(name="", priority_min=-PRIORITY_MAX, reads_metrics=True)
"""Whoever asks a gateway that has no keys."""


class KeySet:
    """Immutable. `len` is 0 if nobody needs a key."""

    def __init__(self, keys: Mapping[bytes, ApiKey]) -> None:
        """By the digest of the key's text."""
        self.keys = keys
        self.names = frozenset(key.name for key in keys.values())
        self._by_prefix: dict[bytes, list[tuple[bytes, ApiKey]]] = {}
        for digest, key in keys.items():
            self._by_prefix.setdefault(digest[:_PREFIX_BYTES], []).append((digest, key))

    def __len__(self) -> int:
        return len(self.names)

    def find(self, text: str) -> ApiKey | None:
        """Takes no longer for a digest that is nearly right: what a table cannot hide is the first
        bytes of digests, which tell nothing of keys."""
        digest = digest_of(text)
        for known, key in self._by_prefix.get(digest[:_PREFIX_BYTES], ()):
            if hmac.compare_digest(known, digest):
                return key
        return None


NO_KEYS = KeySet({})


def parse_keys(text: str) -> KeySet:
    """Of a key file. Raises ConfigError, which names the entry."""
    try:
        file = msgspec.convert(tomllib.loads(text), type=_File)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"not a file of API keys: {error}") from error
    if not file.keys:
        raise ConfigError("there is no key in it; `starfish keys new NAME` makes one")
    if len(file.keys) > KEYS_MAX:
        raise ConfigError(f"more than {KEYS_MAX} keys")
    return _key_set({name: _entry(name, {**file.defaults, **t}) for name, t in file.keys.items()})


def parse_environment(text: str) -> KeySet:
    """`name=key` or `name=sha256:…`, separated by commas; without limits. Raises ConfigError, which
    does not show a key."""
    entries: dict[str, _Entry] = {}
    for number, part in enumerate(filter(None, (p.strip() for p in text.split(","))), 1):
        name, separator, key = part.partition("=")
        if not separator or (not key.startswith(HASH_PREFIX) and len(key) < KEY_CHARACTERS_MIN):
            raise ConfigError(
                f"entry {number} is not NAME=KEY with a key of at least {KEY_CHARACTERS_MIN} "
                f"characters, nor NAME={HASH_PREFIX}…"
            )
        if name in entries:
            raise ConfigError(f"{name!r:.80} is there twice")
        spelt = key if key.startswith(HASH_PREFIX) else HASH_PREFIX + digest_of(key).hex()
        entries[name] = _Entry(hash=spelt)
    return _key_set(entries)


def joined(first: KeySet, second: KeySet) -> KeySet:
    """Raises ConfigError if a name is in both."""
    twice = sorted(first.names & second.names)
    if twice:
        raise ConfigError(f"{twice[0]!r} is both in the file and in the environment")
    return KeySet({**first.keys, **second.keys})


def _entry(name: str, table: dict[str, Any]) -> _Entry:
    try:
        return msgspec.convert(table, type=_Entry)
    except msgspec.ValidationError as error:
        raise ConfigError(f"[keys.{name:.80}]: {error}") from error


def _key_set(entries: dict[str, _Entry]) -> KeySet:
    keys: dict[bytes, ApiKey] = {}
    for name, entry in entries.items():
        check_key_name(name)
        key = _key(name, entry)
        hashes = [entry.hash] if isinstance(entry.hash, str) else entry.hash
        if not hashes:
            raise ConfigError(f"[keys.{name}] has no hash; `starfish keys new {name}` makes one")
        for spelt in hashes:
            try:
                digest = digest_in(spelt)
            except ConfigError as error:
                raise ConfigError(f"[keys.{name}]: {error}") from error
            if digest in keys:
                raise ConfigError(f"{keys[digest].name!r} and {name!r} have the same key")
            keys[digest] = key
    return KeySet(keys)


def _key(name: str, entry: _Entry) -> ApiKey:
    priority_min = entry.priority if entry.priority_min is None else entry.priority_min
    if entry.priority < priority_min:
        raise ConfigError(f"[keys.{name}]: priority is below priority_min")
    return ApiKey(
        name=name,
        limits=KeyLimits(**{f: getattr(entry, f) for f in KeyLimits.__struct_fields__}),
        weight=entry.weight,
        priority=entry.priority,
        priority_min=priority_min,
        reads_metrics=entry.reads_metrics,
    )
