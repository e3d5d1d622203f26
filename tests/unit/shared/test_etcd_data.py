"""What etcd's last words say of its data."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.etcd_data import ROOM_BYTES_MIN, is_damaged, set_aside

ROOM = 10 * ROOM_BYTES_MIN


@pytest.mark.parametrize(
    "last_words",
    [
        '{"level":"fatal","msg":"discovery failed","error":"walpb: crc mismatch"}',
        '{"level":"fatal","error":"wal: max entry size limit exceeded"}',
        '{"level":"panic","msg":"failed to open database","error":"invalid database"}',
        '{"level":"panic","msg":"failed to open database","error":"file size too small"}',
        "panic: runtime error: slice bounds out of range [:1]\n\ngoroutine 1 [running]:",
        "unexpected fault address 0x7f2c\nfatal error: fault\n[signal SIGBUS]",
        "panic: freepages: failed to get all reachable pages (page 14: multiple references)",
    ],
)
def test_what_etcd_says_of_data_that_it_cannot_read(last_words: str) -> None:
    assert is_damaged(last_words, ROOM)


@pytest.mark.parametrize(
    "last_words",
    [
        "",
        '{"level":"fatal","msg":"discovery failed","error":"wal: no space left on device"}',
        "panic: write /data/member/snap/db: no space left on device",
        '{"level":"fatal","error":"listen tcp 127.0.0.1:2379: bind: address already in use"}',
        '{"level":"fatal","error":"open /data/member/wal: permission denied"}',
        "fatal error: runtime: cannot allocate memory",
        '{"level":"fatal","msg":"failed to list data directory","error":"not a directory"}',
    ],
)
def test_what_the_host_is_to_blame_for(last_words: str) -> None:
    assert not is_damaged(last_words, ROOM)


def test_on_a_full_disk_nothing_is_said_of_the_data() -> None:
    assert not is_damaged("panic: freepages", ROOM_BYTES_MIN - 1)


def test_only_the_last_damaged_data_are_kept(tmp_path: Path) -> None:
    for text in ("first", "second"):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "db").write_text(text)
        aside = set_aside(tmp_path / "data")
        assert not (tmp_path / "data").exists()
        assert (aside / "db").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == [aside.name]
