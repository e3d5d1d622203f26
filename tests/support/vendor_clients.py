"""OpenAI's and Anthropic's own clients of a gateway, with the API key if there is one. They try
nothing twice, so that a test sees each answer."""

from __future__ import annotations

import anthropic
import openai

from tests.support.authentication import api_key
from tests.support.gateway_harness import GatewayHarness


def openai_client(harness: GatewayHarness) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=harness.url + "/v1", api_key=api_key(), max_retries=0)


def anthropic_client(harness: GatewayHarness) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=harness.url, api_key=api_key(), max_retries=0)
