"""The API key of commands comes from the environment."""

from __future__ import annotations

from cli.client_headers import client_headers


def test_a_key_is_sent_if_there_is_one() -> None:
    assert client_headers({"STARFISH_API_KEY": " k\n"}) == {"Authorization": "Bearer k"}
    assert client_headers({"STARFISH_API_KEY": " "}) == client_headers({}) == {}
