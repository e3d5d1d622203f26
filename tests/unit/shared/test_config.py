"""Configuration: the order of its sources, and that nothing malformed gets through."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shared.config import Timings, add_flags, load_config, option
from shared.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    port: int = option(8000, "where to listen")
    name: str = option("a", "what to be called")
    folder: Path | None = option(None, "where to look")
    hosts: tuple[str, ...] = option((), "whom to ask")
    loud: bool = option(False, "whether to shout")
    timings: Timings = field(default_factory=Timings)


def load(
    file: Path | None = None,
    environ: dict[str, str] | None = None,
    flags: dict[str, object] | None = None,
) -> Example:
    return load_config(
        Example, section="example", file=file, environ=environ or {}, flags=flags or {}
    )


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[example]\nport = 1\nname = "file"\nlease_ttl_s = 7.0\n')
    config = load(file, {"STARFISH_EXAMPLE_NAME": "env", "PATH": "/bin"}, {"port": "3"})
    assert (config.port, config.name, config.timings.lease_ttl_s) == (3, "env", 7.0)


def test_values_take_the_types_of_their_fields() -> None:
    environ = {
        "STARFISH_EXAMPLE_HOSTS": "a,b",
        "STARFISH_EXAMPLE_LOUD": "true",
        "STARFISH_EXAMPLE_FOLDER": "/x",
        "STARFISH_EXAMPLE_NAME": "8000",
    }
    config = load(environ=environ)
    assert config.hosts == ("a", "b")
    assert config.loud is True
    assert config.folder == Path("/x")
    assert config.name == "8000"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[example]\nprot = 1\n", "prot"),
        ("[example]\nport = 'x'\n", "port"),
        ("[example\n", "TOML"),
    ],
)
def test_a_wrong_file_is_named_with_its_fault(tmp_path: Path, text: str, names: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=names):
        load(file)


def test_a_missing_file_and_an_unknown_variable_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="STARFISH_EXAMPLE_PROT"):
        load(environ={"STARFISH_EXAMPLE_PROT": "1"})


def test_every_field_has_a_flag() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Example)
    given = parser.parse_args(["--port", "9", "--loud", "--lease-ttl-s", "3"])
    config = load(flags=vars(given))
    assert (config.port, config.loud, config.timings.lease_ttl_s) == (9, True, 3.0)


def test_timings_must_fit_into_each_other() -> None:
    Timings().check()
    with pytest.raises(ConfigError, match="exchange deadline < suspicion window"):
        Timings(exchange_deadline_ms=200.0, suspicion_window_ms=100.0).check()
    with pytest.raises(ConfigError):
        Timings(lease_ttl_s=0.1).check()
