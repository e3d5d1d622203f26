"""What is free on a host is read from its kernel."""

from __future__ import annotations

from pathlib import Path

from shared.free_memory import free_bytes


def test_what_is_free_ends_at_the_control_groups_limit(tmp_path: Path) -> None:
    memory_info, group = tmp_path / "meminfo", tmp_path / "group"
    memory_info.write_text("MemTotal: 900 kB\nMemFree: 1 kB\nMemAvailable: 100 kB\n")
    assert free_bytes(memory_info, group) == 100 * 1024
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    assert free_bytes(memory_info, group) == 100 * 1024
    (group / "memory.max").write_text("50000\n")
    (group / "memory.current").write_text("30000\n")
    (group / "memory.stat").write_text("anon 10000\nfile 7000\nshmem 2000\nfile_mapped 11\n")
    assert free_bytes(memory_info, group) == 25_000
