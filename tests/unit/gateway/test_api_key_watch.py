"""The file of API keys is read again when it changes, and kept out if it cannot be used."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway.api_key_watch import ApiKeyWatch
from gateway.metrics import KEY_LABELS_MAX, OTHER_KEYS, GatewayMetrics
from shared.api_key import new_api_key, spelt_hash
from shared.errors import ConfigError

ALICE, BOB = new_api_key(), new_api_key()


def entry(name: str, key: str) -> str:
    return f'[keys.{name}]\nhash = "{spelt_hash(key)}"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.touch(0o600)
    path.write_text(entry("alice", ALICE))
    return path


def test_the_environment_adds_to_the_file_and_contradicts_it_loudly(file: Path) -> None:
    assert ApiKeyWatch(file, f"bob={BOB}").keys.names == {"alice", "bob"}
    assert ApiKeyWatch(None, f"bob={BOB}").keys.names == {"bob"}
    assert len(ApiKeyWatch(None, " ").keys) == 0
    with pytest.raises(ConfigError, match="both"):
        ApiKeyWatch(file, f"alice={BOB}")
    with pytest.raises(ConfigError, match="STARFISH_API_KEYS"):
        ApiKeyWatch(None, "bob")


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o666])
def test_a_file_that_is_not_closed_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        ApiKeyWatch(file, "")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--api-key-file"):
        ApiKeyWatch(tmp_path / "none", "")


async def test_a_signal_reads_at_once_and_a_bad_file_changes_nothing(file: Path) -> None:
    watch = ApiKeyWatch(file, "", poll_s=1000.0)
    task = asyncio.create_task(watch.run())

    async def reread(text: str) -> frozenset[str]:
        """The names once the log has told what has become of the file."""
        num_told = len(logs)
        file.write_text(text)
        watch.reload_now()
        async with asyncio.timeout(30):
            while len(logs) == num_told:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return watch.keys.names

    with capture_logs() as logs:
        try:
            assert await reread(entry("bob", BOB)) == {"bob"}
            assert watch.keys.find(ALICE) is None
            assert await reread("[keys") == {"bob"}
            file.chmod(0o644)
            assert await reread(entry("alice", ALICE)) == {"bob"}
            file.chmod(0o600)
            assert await reread(entry("alice", ALICE)) == {"alice"}
        finally:
            task.cancel()
    told = [log["event"] for log in logs]
    assert told == ["api_keys_read", *["api_keys_unusable"] * 2, "api_keys_read"]


def test_keys_that_come_and_go_for_ever_make_no_more_labels() -> None:
    metrics = GatewayMetrics()
    for number in range(KEY_LABELS_MAX + 50):
        metrics.on_key_request(f"k{number}", 200, num_prompt_tokens=1, num_generated=1)
    text = metrics.render("")[0].decode()
    assert text.count("starfish_gateway_key_prompt_tokens_total{") == KEY_LABELS_MAX + 1
    assert f'key_prompt_tokens_total{{key="{OTHER_KEYS}"}} 50.0' in text
