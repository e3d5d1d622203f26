"""What the OpenAPI document says of an answer."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gateway.api.api_info import GATEWAY_API
from shared.openapi import Endpoint, openapi_document


class Body(msgspec.Struct):
    text: str


def responses(endpoint: Endpoint) -> dict[str, Any]:
    document = openapi_document(GATEWAY_API, [endpoint])
    answers: dict[str, Any] = document["paths"]["/p"][endpoint.method.lower()]["responses"]
    return answers


def endpoint(**fields: Any) -> Endpoint:
    return Endpoint(**{"method": "GET", "path": "/p", "summary": "s", **fields})


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "text/html"])
def test_an_answer_has_its_own_content_type(content_type: str) -> None:
    answer = responses(endpoint(content_type=content_type))["200"]
    assert list(answer["content"]) == [content_type]


def test_an_answer_may_be_a_stream_of_any_events() -> None:
    content = responses(endpoint(method="POST", body=Body, streams=True))["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
    assert "type" not in content["text/event-stream"]["schema"]


def test_an_error_has_a_message_and_the_header_that_says_what_to_do() -> None:
    answers = responses(endpoint(method="POST", body=Body))
    assert {"400", "401", "404", "408", "413", "429", "503", "504"} < set(answers)
    assert set(answers["429"]["headers"]) == set(answers["503"]["headers"]) == {"Retry-After"}
    assert set(answers["401"]["headers"]) == {"WWW-Authenticate"}
    for status, answer in answers.items():
        if status != "200":
            schema = answer["content"]["application/json"]["schema"]
            assert schema["properties"]["error"]["required"] == ["message", "type"]


def test_a_report_is_no_error() -> None:
    answers = responses(endpoint(reports=True))
    assert answers["503"]["content"] == answers["200"]["content"]
    assert "503" not in responses(endpoint())
