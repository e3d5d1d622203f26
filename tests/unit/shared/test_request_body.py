"""What a body may be coded as, and how large it may become."""

from __future__ import annotations

import gzip
import json
import zlib

import pytest

from gateway.api.errors import http_error
from shared.errors import RequestError
from shared.request_body import MEMBERS_MAX, ContentCoding, content_coding, decompress

BODY = json.dumps({"prompt": "x" * 1000}).encode()
LIMIT = 4096


def raw_deflate(body: bytes) -> bytes:
    encoder = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return encoder.compress(body) + encoder.flush()


@pytest.mark.parametrize(
    ("header", "coding"),
    [
        ("", None),
        ("identity", None),
        ("gzip", ContentCoding.GZIP),
        (" GZip ", ContentCoding.GZIP),
        ("x-gzip", ContentCoding.GZIP),
        ("deflate", ContentCoding.DEFLATE),
    ],
)
def test_codings_that_are_served(header: str, coding: ContentCoding | None) -> None:
    assert content_coding(header) is coding


@pytest.mark.parametrize("header", ["br", "zstd", "gzip, gzip", "utf-8", "x" * 10_000])
def test_others_are_415_in_openais_shape(header: str) -> None:
    with pytest.raises(RequestError) as refused:
        content_coding(header)
    error = http_error(refused.value)
    assert error.status == 415
    assert len(error.body) < 400
    assert json.loads(error.body)["error"]["code"] == "unsupported_content_encoding"


def test_several_lines_are_a_list_of_codings() -> None:
    assert content_coding() is None
    for lines in (("gzip", "gzip"), ("identity", "gzip"), ("gzip", "")):
        with pytest.raises(RequestError, match="not supported"):
            content_coding(*lines)


@pytest.mark.parametrize(
    ("coding", "raw"),
    [
        (ContentCoding.GZIP, gzip.compress(BODY, mtime=0)),
        (
            ContentCoding.GZIP,
            b"".join(gzip.compress(part, mtime=0) for part in (BODY[:9], b"", BODY[9:])),
        ),
        (ContentCoding.DEFLATE, zlib.compress(BODY)),
        (ContentCoding.DEFLATE, raw_deflate(BODY)),
    ],
)
def test_a_coded_body_is_read(coding: ContentCoding, raw: bytes) -> None:
    assert decompress(raw, coding, LIMIT) == BODY


@pytest.mark.parametrize("coding", list(ContentCoding))
@pytest.mark.parametrize("raw", [BODY, b"", b"\x00", gzip.compress(BODY, mtime=0)[:-9]])
def test_what_is_not_so_coded_is_a_fault_of_the_client(coding: ContentCoding, raw: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        decompress(raw, coding, LIMIT)
    assert http_error(refused.value).status == 400


def test_members_of_gzip_are_bounded_together() -> None:
    part = gzip.compress(b" " * (LIMIT // 2))
    assert decompress(part * 2, ContentCoding.GZIP, LIMIT) == b" " * LIMIT
    for raw, status in (
        (part * 2 + gzip.compress(b" "), 413),
        (gzip.compress(b"") * (MEMBERS_MAX + 1), 400),
        (part + part[:-1], 400),
        (part + b"x", 400),
    ):
        with pytest.raises(RequestError) as refused:
            decompress(raw, ContentCoding.GZIP, LIMIT)
        assert http_error(refused.value).status == status
    with pytest.raises(RequestError):
        decompress(zlib.compress(b"a") * 2, ContentCoding.DEFLATE, LIMIT)


@pytest.mark.parametrize("coding", list(ContentCoding))
def test_a_body_that_becomes_too_large_is_413(coding: ContentCoding) -> None:
    bomb = {
        ContentCoding.GZIP: gzip.compress(b" " * (64 << 20)),
        ContentCoding.DEFLATE: zlib.compress(b" " * (64 << 20)),
    }[coding]
    with pytest.raises(RequestError) as refused:
        decompress(bomb, coding, LIMIT)
    assert http_error(refused.value).status == 413


def test_a_body_of_just_the_limit_is_read() -> None:
    assert decompress(gzip.compress(b"x" * LIMIT), ContentCoding.GZIP, LIMIT) == b"x" * LIMIT
