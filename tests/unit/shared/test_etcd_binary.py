"""Which etcd the embedded one is."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.etcd_binary import Version, etcd_binary, newer, packaged_etcd, version_of


@pytest.mark.parametrize(
    ("found", "packaged", "taken"),
    [
        ((3, 5, 2), (3, 5, 1), True),
        ((3, 6, 0), (3, 5, 21), True),
        ((3, 5, 1), (3, 5, 1), False),
        ((3, 4, 23), (3, 5, 1), False),
        ((4, 0, 0), (3, 5, 1), False),
        (None, (3, 5, 1), False),
        ((3, 5, 2), None, False),
    ],
)
def test_a_newer_one_of_the_same_major_version_is_taken(
    found: Version | None, packaged: Version | None, taken: bool
) -> None:
    assert newer(found, packaged) is taken


def put_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> Path:
    binary = folder / "etcd"
    binary.write_text(f"#!/bin/sh\n{says}\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return binary


@pytest.mark.parametrize(
    ("says", "taken"),
    [
        ("echo 'etcd Version: 3.5.99'; echo 'Git SHA: 1'", True),
        ("echo 'etcd Version: 3.4.23'", False),
        ("echo nothing; exit 1", False),
    ],
)
async def test_the_path_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, taken: bool
) -> None:
    binary = put_on_path(tmp_path, monkeypatch, says)
    assert await etcd_binary() == (binary if taken else packaged_etcd())


async def test_the_packaged_one_says_its_version() -> None:
    packaged = packaged_etcd()
    assert packaged is not None
    assert await version_of(packaged) >= (3, 5, 1)  # type: ignore[operator]
