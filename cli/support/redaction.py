"""Takes secrets out of texts: those that are known, and whatever looks like one. Better too much
than too little. Pure, but for `known_secrets`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from shared.api_key import HASH_PREFIX, KEY_PREFIX

REMOVED = "[removed]"
SECRET_BYTES_MIN = 8
"""A shorter text would take words out of everything."""
_FILE_BYTES_MAX = 1 << 20
_SECRET_WORDS = (
    r"(?:pass(?:word|wd|phrase)|secret|token(?!s|_i|iz)|api[_-]?key|authorization|credential|"
    r"private[_-]?key|access[_-]?key|hmac|cookie)"
)
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S
        ),
        REMOVED,
    ),
    (re.compile(re.escape(KEY_PREFIX) + r"[\w%-]+"), KEY_PREFIX + REMOVED),
    (re.compile(r"\b(?:sk|pk|hf|ghp|glpat|xox[abp])[-_][A-Za-z0-9_-]{16,}"), REMOVED),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]+"), REMOVED),  # a JSON web token
    (re.compile(re.escape(HASH_PREFIX) + r"[0-9a-fA-F]{64}"), HASH_PREFIX + REMOVED),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 " + REMOVED),
    # Headers of OpenTelemetry's exporter: with a key under any name.
    (re.compile(r"""(\w_HEADERS["']?\s*[=:]\s*["']?)[^\n\0"']{4,}"""), r"\1" + REMOVED),
    (re.compile(r"(?<=://)[^/\s:@'\"]*:[^/\s@'\"]+(?=@)"), REMOVED),
)
_NAMED = re.compile(
    rf"(?i)(?P<name>[\w.-]*{_SECRET_WORDS}[\w.-]*)(?P<sign>[\"']?\s*[=:]\s*[\"']?)"
    r"(?P<value>[^\s\"',}\]]{4,})"
)
"""name=value, name: value and "name": "value"."""
_NOT_SECRET = ("file", "files", "path", "dir", "folder", "parser", "type")
"""Ends of names whose value is none: of `secret_file`, and of the like."""


class Redactor:
    def __init__(self, secrets: Iterable[bytes]) -> None:
        """`secrets` are those that are known; short ones and repeated ones are left out."""
        known = {secret.strip() for secret in secrets}
        self._known = sorted(
            (s for s in known if len(s) >= SECRET_BYTES_MIN), key=len, reverse=True
        )

    def clean(self, content: bytes) -> bytes:
        for secret in self._known:
            content = content.replace(secret, REMOVED.encode())
        text = content.decode("utf-8", "surrogateescape")
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
        text = _NAMED.sub(_without_value, text)
        return text.encode("utf-8", "surrogateescape")


def _without_value(found: re.Match[str]) -> str:
    if found["name"].lower().endswith(_NOT_SECRET):
        return found[0]
    return found["name"] + found["sign"] + REMOVED


def known_secrets(
    environ: Mapping[str, str], files: Iterable[Path], folders: Iterable[Path]
) -> Iterator[bytes]:
    """The lines of these files and of all keys and passwords in these folders, and what variables
    hold that are named like a secret. What cannot be read cannot come into a bundle either."""
    for name, value in environ.items():
        if name.endswith("_HEADERS"):
            pairs = value.encode("utf-8", "surrogateescape").split(b",")
            yield from (pair.partition(b"=")[2] for pair in pairs)
        if re.search(_SECRET_WORDS, name, re.IGNORECASE) and not name.lower().endswith("_file"):
            yield from value.encode("utf-8", "surrogateescape").replace(b",", b"\n").split()
    found = [*files]
    for folder in folders:
        for pattern in ("*.key", "*.password", "*secret*", "*.pem"):
            found += folder.rglob(pattern)
    for path in found:
        try:
            content = path.read_bytes()[:_FILE_BYTES_MAX] if path.is_file() else b""
        except OSError:
            continue
        if path.suffix != ".pem" or b"PRIVATE KEY" in content:
            yield from (line for line in content.splitlines() if b"-----" not in line)
