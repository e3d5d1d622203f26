"""API keys of clients: what one looks like, and the form in which it is kept. A key is 256 random
bits, so nobody finds it by trying, and a plain hash, fast and unsalted, is enough."""

from __future__ import annotations

import hashlib
import re
import secrets

from shared.errors import ConfigError

KEY_PREFIX = "sk-starfish-"
HASH_PREFIX = "sha256:"
KEY_CHARACTERS_MIN = 32
NAME_RULE = "1 to 64 letters, digits, '.', '_' and '-', the first a letter or digit"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(re.escape(KEY_PREFIX) + r"[\w%-]+", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{64}")


def new_api_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(32)


def without_keys(text: str) -> str:
    """For logs of what clients send: a key may be where it does not belong."""
    return _KEY.sub(KEY_PREFIX + "…", text)


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def spelt_hash(key: str) -> str:
    """As files have it."""
    return HASH_PREFIX + digest_of(key).hex()


def digest_in(text: str) -> bytes:
    """The digest that `spelt_hash` gave. Raises ConfigError."""
    found = text.removeprefix(HASH_PREFIX)
    if not text.startswith(HASH_PREFIX) or not _HASH.fullmatch(found):
        raise ConfigError(
            f"a hash is {HASH_PREFIX} and 64 digits of 0-9 and a-f; `starfish keys new NAME` makes "
            "one"
        )
    return bytes.fromhex(found)


def check_key_name(name: str) -> None:
    """Raises ConfigError if it cannot be the name of a key: it shows in logs and metrics."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name[:80]!r} is no name of a key: {NAME_RULE}")
