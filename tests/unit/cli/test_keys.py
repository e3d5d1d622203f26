"""`starfish keys new`: a key is shown once, and the gateway takes it from the file."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.__main__ import app
from cli.keys import add_entry, key_entry
from gateway.api_keys import parse_keys
from shared.api_key import new_api_key
from shared.errors import ConfigError


def test_keys_are_added_to_a_file_that_only_its_user_reads(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    shown = {}
    for name in ("alice", "team.b"):
        result = CliRunner().invoke(app, ["keys", "new", name, "--file", str(file)])
        assert result.exit_code == 0, result.output
        shown[name] = result.output.splitlines()[0]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    keys = parse_keys(file.read_text())
    for name, key in shown.items():
        assert key not in file.read_text()
        found = keys.find(key)
        assert found is not None
        assert found.name == name


def test_without_a_file_the_entry_is_shown() -> None:
    result = CliRunner().invoke(app, ["keys", "new", "alice"])
    key, _, entry = result.output.partition("\n\n")
    assert parse_keys(entry[entry.index("[keys") :]).find(key) is not None


def test_a_name_is_not_given_twice_and_the_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    add_entry(file, "alice", key_entry("alice", new_api_key()))
    before = file.read_bytes()
    result = CliRunner().invoke(app, ["keys", "new", "alice", "--file", str(file)])
    assert result.exit_code == 1
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", ["[keys", "x = \xff"])
def test_a_file_that_is_no_toml_stays(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.toml"
    file.touch(0o600)
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="TOML"):
        add_entry(file, "alice", key_entry("alice", new_api_key()))
    assert file.read_text(encoding="latin-1") == text


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 65, "a/b", 'a"b'])
def test_names_that_could_not_stand_in_a_log_are_refused(name: str) -> None:
    result = CliRunner().invoke(app, ["keys", "new", "--", name])
    assert result.exit_code == 1


def test_an_entry_follows_a_line_without_an_end(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.touch(0o600)
    file.write_text("# mine")
    add_entry(file, "a", key_entry("a", new_api_key()))
    assert len(parse_keys(file.read_text())) == 1
