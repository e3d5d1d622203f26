"""The bodies of `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from gateway.api.bodies import DialectBody


class Thinking(msgspec.Struct, kw_only=True):
    """`type` is enabled, adaptive or disabled; `display` summarized (all of it is shown) or
    omitted."""

    type: str
    budget_tokens: int | None = None
    display: str | None = None


class OutputConfig(msgspec.Struct, kw_only=True):
    """`effort` is a variable of the chat template."""

    format: dict[str, Any] | None = None
    effort: str | None = None


class CountBody(DialectBody, kw_only=True):
    """What makes up the prompt."""

    instead: ClassVar[Mapping[str, str]] = {
        "stop": "stop_sequences",
        "max_completion_tokens": "max_tokens",
        "thinking_token_budget": "thinking",
        "include_reasoning": "thinking",
        "reasoning_effort": "output_config",
        "response_format": "output_config",
        "parallel_tool_calls": "tool_choice",
    }

    model: str | None = None
    messages: list[Any]
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: dict[str, Any] | None = None
    # They change nothing in the answer:
    cache_control: Any = None
    speed: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None


class MessagesBody(CountBody, kw_only=True):
    max_tokens: int
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop_sequences: list[str] | None = None
    seed: int | None = None  # ours: that API has none
    output_format: dict[str, Any] | None = None
    # They change nothing in the answer:
    metadata: Any = None
    service_tier: Any = None
    inference_geo: Any = None
    diagnostics: Any = None
    billing_policy: Any = None
    fallbacks: Any = None  # no model here refuses
    fallback_credit_token: Any = None
    # Read only to be rejected:
    thread: Any = None
    compaction: Any = None
    container: Any = None
    mcp_servers: list[Any] | None = None
