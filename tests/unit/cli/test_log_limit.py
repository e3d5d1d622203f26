"""Logs that have become large are cut, while their writers go on."""

from __future__ import annotations

from pathlib import Path

from cli.up.log_limit import rotate_logs
from shared.logs import open_log

LIMIT = 100


def test_a_large_log_begins_anew_and_its_writer_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "agent.log"
    with open_log(log) as writer:
        writer.write(b"a" * (LIMIT + 1))
        writer.flush()
        rotate_logs([tmp_path], LIMIT)
        writer.write(b"b")
        writer.flush()
    assert log.read_bytes() == b"b"
    assert log.stat().st_blocks * 512 < 2 * LIMIT + 4096  # no hole, and nothing before it
    assert (tmp_path / "agent.log.1").read_bytes() == b"a" * (LIMIT + 1)


def test_a_small_log_and_other_files_stay(tmp_path: Path) -> None:
    for name in ("agent.log", "secret"):
        (tmp_path / name).write_bytes(b"a" * (LIMIT if name == "agent.log" else LIMIT * 9))
    rotate_logs([tmp_path, tmp_path / "absent"], LIMIT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agent.log", "secret"]
    assert len((tmp_path / "agent.log").read_bytes()) == LIMIT


def test_only_the_last_two_parts_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    for part in (b"a", b"b", b"c"):
        with open_log(log) as writer:
            writer.write(part * (LIMIT + 1))
        rotate_logs([tmp_path], LIMIT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gateway.log", "gateway.log.1"]
    assert (tmp_path / "gateway.log.1").read_bytes() == b"c" * (LIMIT + 1)


def test_without_room_for_a_copy_it_begins_anew_all_the_same(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    log.write_bytes(b"a" * (LIMIT + 1))
    (tmp_path / "gateway.log.1").mkdir()  # cannot be written
    rotate_logs([tmp_path], LIMIT)
    assert log.read_bytes() == b""
