"""Where an answer ends, for a client that sends the next request at once."""

from __future__ import annotations

import pytest

from benchmarks.router_load import is_whole

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nx-starfish-rank: 0\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        CHUNKED + b"3\r\nabc\r\n0\r\n\r\n",
        CHUNKED + b"0\r\n\r\n",
    ],
)
def test_an_answer_is_whole_with_its_last_byte_and_not_before(answer: bytes) -> None:
    assert [at for at in range(len(answer) + 1) if is_whole(bytearray(answer[:at]))] == [
        len(answer)
    ]
