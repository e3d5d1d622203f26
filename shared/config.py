"""Fills a service's frozen config dataclass once: defaults, then a TOML table, then the
environment, then flags. Unknown keys and malformed values stop the process with one sentence."""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from shared.errors import ConfigError

C = TypeVar("C")


def option(default: Any, help: str) -> Any:
    """A config field with the text that `--help` shows for it."""
    return field(default=default, metadata={"help": help})


LONGEST_LEARNT_SILENCE_MS = 3000.0
"""The longest silence before a verdict if the window is learnt (`control_plane/silence.py`)."""


LONGEST_ANNOUNCED_S = 4.0
"""An operation that a rank announces excuses a silence of this length at most. It is shorter than
a lease lasts by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Waits that depend on each other: exchange deadline < suspicion window < lease TTL. A window
    of 0 is learnt: the control plane follows what the instance and the kernel tell."""

    exchange_deadline_ms: float = option(
        40.0, "a peer's data later than this raises a suspicion (the wait itself goes on)"
    )
    suspicion_window_ms: float = option(
        0.0,
        "a suspected rank that answers no probe for this long is declared dead; 0: follow what its "
        "node agent sees and how fast this instance usually answers",
    )
    lease_ttl_s: float = option(5.0, "etcd lease of every process; the last backstop")

    @property
    def longest_silence_ms(self) -> float:
        """For how long a suspected rank may be silent at the most before a verdict."""
        return self.suspicion_window_ms or LONGEST_LEARNT_SILENCE_MS

    def check(self) -> None:
        """Raises ConfigError if the order does not hold."""
        lease_ttl_ms = self.lease_ttl_s * 1000
        if not 0 < self.exchange_deadline_ms < self.longest_silence_ms < lease_ttl_ms:
            raise ConfigError(
                "timings must satisfy 0 < exchange deadline < suspicion window < lease TTL, "
                f"but are {self.exchange_deadline_ms} ms, {self.longest_silence_ms} ms, "
                f"{self.lease_ttl_s} s"
            )


def add_flags(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """One `--flag` per field of the dataclass `cls`, nested dataclasses flattened."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            add_flags(parser, typing.cast(type[Any], hint))
            continue
        flag = "--" + item.name.replace("_", "-")
        text = str(item.metadata.get("help", "")).replace("%", "%%")
        if item.default is not dataclasses.MISSING and item.default not in (None, "", ()):
            shown = item.default.value if isinstance(item.default, Enum) else item.default
            text += f" (default {shown})".replace("%", "%%")
        if hint is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=text
            )
        else:
            parser.add_argument(flag, default=None, metavar="X", help=text)


def load_config(
    cls: type[C],
    *,
    section: str,
    file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
) -> C:
    """`[section]` of the TOML file, `STARFISH_<SECTION>_<FIELD>` of the environment, then `flags`
    that are not None. Raises ConfigError."""
    names = set(_leaf_names(cls))
    raw: dict[str, Any] = {}
    if file is not None:
        table = _read_toml(file).get(section, {})
        unknown = sorted(set(table) - names)
        if unknown:
            raise ConfigError(f"{file}: unknown key {unknown[0]!r} in [{section}]")
        raw.update(table)
    prefix = f"STARFISH_{section.upper()}_"
    for variable, value in environ.items():
        if variable.startswith(prefix):
            name = variable[len(prefix) :].lower()
            if name not in names:
                raise ConfigError(f"environment: {variable} names no option of {section}")
            raw[name] = value
    raw.update({k: v for k, v in flags.items() if k in names and v is not None})
    try:
        result = msgspec.convert(_nest(cls, raw), type=cls, strict=False, dec_hook=_decode_path)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{section} configuration: {error}") from error
    return result


def _decode_path(kind: type[Any], value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(f"no configuration value of type {kind}")


def _leaf_names(cls: type[Any]) -> list[str]:
    hints = typing.get_type_hints(cls)
    names: list[str] = []
    for item in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(hints[item.name])
        names += _leaf_names(hints[item.name]) if nested else [item.name]
    return names


def _nest(cls: type[Any], raw: dict[str, Any]) -> dict[str, Any]:
    """Moves flat values into the nested dataclass they belong to; splits comma lists."""
    hints = typing.get_type_hints(cls)
    result: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            result[item.name] = _nest(typing.cast(type[Any], hint), raw)
        elif item.name in raw:
            value = raw[item.name]
            if typing.get_origin(hint) is tuple and isinstance(value, str):
                value = [part for part in value.split(",") if part]
            result[item.name] = str(value) if hint is str else value
    return result


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
