"""Reads texts out of unpacked packages: one function per format, each yielding plain documents.

What is read, from where, and its weight is the table in `sources.py`; this file knows formats only.
"""

from __future__ import annotations

import gzip
import html
import json
import re
import struct
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path

from cleaning import is_fit

CHUNK_CHARS = 6000  # books become documents of about this size, cut between paragraphs


def paragraphs(text: str) -> list[str]:
    return [p for p in re.split(r"\n\s*\n", text.replace("\r\n", "\n")) if p.strip()]


def unwrap(paragraph: str) -> str:
    """Joins the hard line breaks of prose; verse (short lines) keeps them."""
    lines = [line.rstrip() for line in paragraph.strip("\n").split("\n")]
    if len(lines) > 1 and max(map(len, lines)) < 58:
        return textwrap.dedent("\n".join(lines)).strip("\n")
    return " ".join(line.strip() for line in lines)


def chunks(parts: list[str], *, size: int = CHUNK_CHARS) -> Iterator[str]:
    """Groups paragraphs into documents, so that a held-out document is a whole stretch of text."""
    held: list[str] = []
    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= size:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)


def book(path: Path) -> Iterator[str]:
    text = path.read_text("utf-8-sig", "replace")
    text = re.split(r"\*\*\* ?START OF (?:THIS|THE) PROJECT GUTENBERG[^\n]*\n", text)[-1]
    text = re.split(r"\n(?:\*\*\* ?)?E(?:ND|nd) (?:OF|of) (?:THIS |THE |the |Project )", text)[0]
    text = text.replace("_", "")
    kept = [unwrap(p) for p in paragraphs(text) if "Gutenberg" not in p and "Produced by" not in p]
    yield from chunks(kept)


def books(folder: Path, pattern: str, skip: str = r"$^") -> Iterator[str]:
    for path in sorted(folder.glob(pattern)):
        if not re.search(skip, path.name):
            yield from book(path)


def r_character_vectors(path: Path) -> Iterator[str]:
    """The string vectors of an R lazy-load database: sized zlib blocks of XDR serialisation."""
    data = path.read_bytes()
    while data:
        block = zlib.decompressobj()
        raw = block.decompress(data[4:])
        data = block.unused_data
        lines, at = list[str](), 0
        # A CHARSXP: flags (type 9, with the ASCII or the UTF-8 bit), its length, its bytes.
        while flags := re.compile(rb"\x00(?:\x04\x00|\x00\x80)\x09").search(raw, at):
            (length,) = struct.unpack_from(">i", raw, flags.end())
            at = flags.end() + 4 + max(length, 0)
            lines.append(raw[flags.end() + 4 : at].decode("utf-8", "replace"))
        if len(lines) > 100:
            yield "\n".join(lines)


def austen(path: Path) -> Iterator[str]:
    for novel in r_character_vectors(path):
        yield from chunks([unwrap(p) for p in paragraphs(novel.replace("_", ""))])


def sword_text(folder: Path) -> Iterator[str]:
    """A Bible in SWORD's zText format, one book a compressed block; notes and markup dropped."""
    for index in sorted(folder.glob("*/*.bzs"), reverse=True):
        blocks, body = index.read_bytes(), index.with_suffix(".bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", blocks):
            raw = zlib.decompress(body[offset : offset + size]).decode("utf-8", "replace")
            raw = re.sub(r"<note.*?</note>|<title.*?</title>", "", raw, flags=re.S)
            raw = re.sub(r"<(?:chapter|div)\b[^>]*>", "\n\n", raw)
            text = html.unescape(re.sub(r"<[^>]+>", "", raw))
            text = re.sub(r"[ \t]+([,.;:!?])", r"\1", re.sub(r"[ \t]+", " ", text)).replace("¶", "")
            kept = [" ".join(p.split()) for p in paragraphs(text)]
            yield from chunks([p for p in kept if len(p) > 20])


def wesnoth(folder: Path) -> Iterator[str]:
    """Story screens and spoken lines of the campaigns, scenario by scenario."""
    for path in sorted(folder.rglob("campaigns/*/**/*.cfg")):
        text = path.read_text("utf-8", "replace")
        found = re.findall(
            r"^\s*(story|message|speaker)\s*=\s*(?:_ *)?(\"(?:[^\"]|\"\")*\"|\w+)", text, re.M
        )
        parts, speaker = [], ""
        for key, value in found:
            value = " ".join(re.sub(r"<[^>]+>", "", value.strip('"').replace('""', '"')).split())
            if key == "speaker":
                speaker = (
                    value.title() if re.fullmatch(r"[A-Z][a-z]+(?: [A-Z][a-z]+)*", value) else ""
                )
            elif len(value) > 15 and " " in value:
                parts.append(f"{speaker}: {value}" if key == "message" and speaker else value)
                speaker = ""
        if sum(map(len, parts)) > 400:
            yield from chunks(parts)


def factbook(folder: Path) -> Iterator[str]:
    """Country profiles: every text field that is a sentence or two, under its name."""
    for path in sorted(folder.glob("*/*.json")):
        if path.parent.name == "meta":
            continue
        profile = json.loads(path.read_text("utf-8"))
        names = profile.get("Government", {}).get("Country name", {})
        name = names.get("conventional short form", {}).get("text", "")
        if not name or name == "none":
            continue
        parts = [
            f"{label}: {text}" for label, text in text_fields(profile) if 40 < len(text) < 3000
        ]
        if parts:
            yield f"{name}\n\n" + "\n\n".join(parts)


def text_fields(node: dict[str, object], label: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if key == "text" and isinstance(value, str):
            yield label, " ".join(value.split())
        elif isinstance(value, dict):
            yield from text_fields(value, key)


def gcide(path: Path) -> Iterator[str]:
    """Entries of the dictionary without pronunciation, etymology and source tags."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    text = text[text.index("\n\nA \\A\\") if "\n\nA \\A\\" in text else 0 :]
    for entry in re.split(r"\n(?=\S)", text):
        head, _, _ = entry.partition("\\")
        if "\\" not in entry or not 1 < len(head) < 60:
            continue
        entry = re.sub(r"^([^\\\n]+)\\[^\\]*\\ ?(?:\([^)]*\))?", lambda m: m[1].strip(), entry)
        entry = re.sub(r"\[(?:1913 Webster|PJC|WordNet[^\]]*|[^\]]{0,30}\+PJC)\]", "", entry)
        entry = re.sub(r"\[[^\]]{12,}\]", "", entry, count=2) if "[" in entry[:400] else entry
        entry = re.sub(r"\[[a-z'`^~\"=.*,/-]{1,5}\]", "", entry).replace("{", "").replace("}", "")
        kept = [" ".join(p.split()) for p in paragraphs(entry)]
        body = "\n".join(re.sub(r" +([,.;])", r"\1", p) for p in kept if p)
        if 40 < len(body) < 8000 and is_fit(body):
            yield body


def dictd(path: Path) -> Iterator[str]:
    """The Devil's Dictionary and the Jargon File: entries start in column 0."""
    text = (
        gzip.decompress(path.read_bytes())
        .decode("utf-8", "replace")
        .replace("{", "")
        .replace("}", "")
    )
    for entry in re.split(r"\n\n+(?=\S)", text)[4:]:
        yield "\n\n".join(" ".join(p.split()) for p in paragraphs(entry))


def wordnet_entries(folder: Path) -> Iterator[tuple[list[str], str, str, list[str]]]:
    """(words, part of speech, definition, examples) of every synset."""
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{kind}").read_text("utf-8").splitlines():
            if line.startswith("  "):
                continue
            data, _, gloss = line.partition(" | ")
            fields = data.split()
            words = [
                w.split("(")[0].replace("_", " ")
                for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            ]
            examples = re.findall(r'"([^"]+)"', gloss)
            definition = re.sub(r';?\s*"[^"]*"(?:\s*-[^;]*)?', "", gloss).strip(" ;")
            name = {"adj": "adjective", "adv": "adverb"}.get(kind, kind)
            if definition and is_fit(definition):
                yield words, name, definition, examples


def wordnet(folder: Path) -> Iterator[str]:
    for words, kind, definition, examples in wordnet_entries(folder):
        quoted = "".join(f' "{e[0].upper()}{e[1:]}"' for e in examples)
        yield f"{', '.join(words)} ({kind}): {definition}.{quoted}"


def rst(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.rst.txt")):
        text = path.read_text("utf-8", "replace")
        text = re.sub(
            r"^\.\. (?:sectionauthor|moduleauthor|index|highlight|_|XXX|\d).*\n",
            "",
            text,
            flags=re.M,
        )
        text = re.sub(r":[\w:]+:`[~!]?([^`<]*?)(?: ?<[^>]*>)?`", r"\1", text).replace("``", "`")
        yield from chunks(paragraphs(text))


def pod(folder: Path, skip: str) -> Iterator[str]:
    for path in sorted(folder.rglob("*.pod")):
        if re.search(skip, path.name):
            continue
        text = re.sub(
            r"[A-Z]<+ ?([^<>|]*\|)?([^<>]*?) ?>+", r"\2", path.read_text("utf-8", "replace")
        )
        yield from chunks(
            [p for p in paragraphs(text) if not p.startswith(("=encoding", "=for", "=cut"))]
        )


def html_pages(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.html")):
        raw = re.sub(r"<(head|script|style).*?</\1>", "", path.read_text("utf-8"), flags=re.S)
        raw = re.sub(r"<(?:p|div|h\d|li|pre|td|dt|dd)\b[^>]*>", "\n\n", raw)
        text = html.unescape(re.sub(r"<[^>]+>", "", raw))
        kept = [" ".join(p.split()) for p in paragraphs(text)]
        yield from chunks([p for p in kept if len(p) > 60])
