"""One switch for all authentication that an instance can ask for: with STARFISH_TEST_AUTHENTICATED
set, the gateways of tests want an API key, for metrics too, and every control port the instance's
secret. etcd has certificates and users in either case. Tests ask as they always do: through
`client_session`, and with `access_to`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from cli.client_headers import VARIABLE as API_KEY_VARIABLE
from cli.keys import add_entry, key_entry
from shared.api_key import new_api_key
from shared.handshake import Access
from shared.secret import create_secret, read_secret

SWITCH = "STARFISH_TEST_AUTHENTICATED"
_KEYS_VARIABLE = "STARFISH_GATEWAY_API_KEY_FILE"
_SECRET_VARIABLES = tuple(
    f"STARFISH_{service}_SECRET_FILE" for service in ("AGENT", "CONTROL_PLANE", "GATEWAY", "RANK")
)


def switch_on_if_wanted() -> Callable[[], None]:
    """Makes a key and a secret, and has all processes that this one starts use them, by their
    environment. Call it before the first test, and what it returns after the last."""
    if not os.environ.get(SWITCH) or _KEYS_VARIABLE in os.environ:
        return lambda: None
    folder = Path(tempfile.mkdtemp(prefix="starfish-authenticated-"))
    keys, secret, key = folder / "keys.toml", folder / "secret", new_api_key()
    add_entry(keys, "tests", key_entry("tests", key) + "reads_metrics = true\n")
    create_secret(secret)
    os.environ[API_KEY_VARIABLE] = key
    os.environ[_KEYS_VARIABLE] = str(keys)
    os.environ["STARFISH_GATEWAY_METRICS_NEED_KEY"] = "true"
    for variable in _SECRET_VARIABLES:
        os.environ[variable] = str(secret)
    return lambda: shutil.rmtree(folder)


def api_key_file() -> Path | None:
    """None: gateways want no key."""
    path = os.environ.get(_KEYS_VARIABLE)
    return None if path is None else Path(path)


def api_key() -> str:
    """Any text if gateways want no key."""
    return os.environ.get(API_KEY_VARIABLE, "none")


def secret_file() -> Path | None:
    """None: control ports want none."""
    path = os.environ.get(_SECRET_VARIABLES[0])
    return None if path is None else Path(path)


def secret_flags() -> list[str]:
    """For `starfish` commands that ask ranks."""
    path = secret_file()
    return [] if path is None else ["--secret-file", str(path)]


def access_to(instance: str) -> Access:
    """What a process of this instance needs at its control ports."""
    return Access(instance, read_secret(secret_file()))


def client_session(**options: Any) -> aiohttp.ClientSession:
    """A client of a gateway, with the API key if there is one."""
    headers = {"x-api-key": api_key(), **options.pop("headers", {})}
    return aiohttp.ClientSession(headers=headers, **options)
