"""Checks of the project's Markdown that a site generator does not make: the width of prose, that
every file that a page names is there, and that the index lists every page."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLUMNS_MAX = 100
INDEX = "docs/index.md"
# Read by other programs, or beside the model that they describe.
NOT_OURS = ("models/", "examples/", "docs/reference/")
# Prefixes of keys in etcd, which look like folders.
NOT_FOLDERS = ("serving/", "ranks/", "residents/", "assignments/", "/starfish/<instance>/")
_LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")
_CODE = re.compile(r"`([\w.][\w./-]*)`")
_SUFFIXES = (".py", ".md", ".sh", ".yml", ".toml", ".c")


def main() -> int:
    problems = check_all()
    print("\n".join(problems) or "pages are well-formed, and name files that are there")
    return 1 if problems else 0


def check_all() -> list[str]:
    tracked = list_files()
    return [
        *unlisted_pages((ROOT / INDEX).read_text(), tracked),
        *_check_pages(tracked),
    ]


def unlisted_pages(index: str, tracked: list[str]) -> Iterator[str]:
    """One sentence for each page of the documentation to which the index has no link."""
    listed = {f"docs/{target}" for target, _ in _LINK.findall(index)}
    for name in tracked:
        if name.startswith("docs/") and name.endswith(".md") and name not in {INDEX, *listed}:
            yield f"{INDEX}: does not list {name}"


def _check_pages(tracked: list[str]) -> list[str]:
    return [
        problem
        for name in tracked
        if name.endswith(".md") and not name.startswith(NOT_OURS)
        for problem in check_page(name, (ROOT / name).read_text(), tracked)
    ]


def list_files() -> list[str]:
    """All files of the project, those not committed yet among them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def check_page(name: str, text: str, tracked: list[str]) -> Iterator[str]:
    """One sentence for each line that is too wide, that names a file which is not in `tracked`, or
    that links to no page or to no heading of a page. Tables and blocks of code may be wider; what
    blocks of code name is not looked at."""
    folders = {f"{parent}/" for file in tracked for parent in Path(file).parents}
    in_code = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
            continue
        if in_code:
            continue
        if len(line) > COLUMNS_MAX and not line.startswith("|"):
            yield f"{name}:{number}: {len(line)} columns; prose has at most {COLUMNS_MAX}"
        for path in _CODE.findall(line):
            if not _is_there(path, tracked, folders):
                yield f"{name}:{number}: there is no {path}"
        for target, anchor in _LINK.findall(line):
            if "://" in target:
                continue
            page = (ROOT / name).parent / target if target else ROOT / name
            if not page.exists() or (anchor and anchor not in headings(page.read_text())):
                yield f"{name}:{number}: the link to {target}#{anchor} leads nowhere"


def headings(text: str) -> set[str]:
    """The anchors of a page, as its readers make them of its headings."""
    lines = (line.lstrip("#").strip().lower() for line in text.splitlines() if line[:1] == "#")
    return {re.sub(r"[^\w\- ]", "", line).replace(" ", "-") for line in lines}


def _is_there(path: str, tracked: list[str], folders: set[str]) -> bool:
    """True for what is no path. A path may leave out folders at its beginning."""
    if path.endswith("/"):
        return path in NOT_FOLDERS or any(f"/{name}".endswith(f"/{path}") for name in folders)
    if not path.endswith(_SUFFIXES):
        return True
    return any(f"/{file}".endswith(f"/{path}") for file in tracked)


if __name__ == "__main__":
    sys.exit(main())
