"""Normalises a text and names it by its contents."""

from __future__ import annotations

import hashlib
import re
import unicodedata


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def clean(text: str) -> str:
    text = unicodedata.normalize("NFC", text).replace("\t", "    ").replace("\u00a0", " ")
    text = text.translate(str.maketrans("“”‘’", "\"\"''"))
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f\ufffd]", "", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", text)).strip()


def is_fit(text: str) -> bool:
    """Leaves out what dictionaries themselves mark as abuse."""
    return not re.search(r"offensive|disparag|slur\b|obscen|vulgar|sexual", text, re.I)
