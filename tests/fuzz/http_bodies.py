"""A whole request to each path of the HTTP API that reads a body. Hostile ones are changed copies
of these."""

from __future__ import annotations

from typing import Any

from tests.support.gateway_harness import MODEL

TOOL: dict[str, Any] = {
    "name": "look_up",
    "description": "finds a word",
    "parameters": {
        "type": "object",
        "properties": {"word": {"type": "string"}, "limit": {"type": "integer"}},
        "required": ["word"],
    },
}
CHAT_TOOLS = [{"type": "function", "function": TOOL}]
COMPLETION: dict[str, Any] = {
    "model": MODEL,
    "prompt": "hello",
    "max_tokens": 3,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "n": 2,
    "best_of": 2,
    "seed": 7,
    "stop": ["a", "b"],
    "stop_token_ids": [1],
    "logprobs": 2,
    "prompt_logprobs": 1,
    "echo": True,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"3": 1.5},
    "bad_words": ["b"],
    "allowed_token_ids": [1, 2, 3],
    "truncate_prompt_tokens": 4,
    "truncation_side": "left",
    "stream": False,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    "guided_regex": "[ab]+",
    "guided_json": {"type": "object", "properties": {"a": {"enum": [1, "x"]}}},
    "guided_choice": ["yes", "no"],
    "guided_grammar": 'root ::= "a" | "b" root',
    "structured_outputs": {"choice": ["a"]},
    "user": "u",
    "ignore_eos": False,
    "min_tokens": 1,
    "return_token_ids": True,
    "priority": 0,
    "timeout": 5.0,
    "cache_salt": "s",
}
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "n"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ],
    "max_tokens": 3,
    "logprobs": True,
    "top_logprobs": 2,
    "n": 1,
    "stream": True,
    "stop": "x",
    "chat_template_kwargs": {"a": 1},
    "response_format": {"type": "json_object"},
    "max_completion_tokens": 4,
    "tools": CHAT_TOOLS,
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "documents": [{"title": "t", "text": "d"}],
    "add_generation_prompt": True,
    "continue_final_message": False,
    "reasoning_effort": "low",
    "thinking_token_budget": 3,
    "include_reasoning": True,
}
ANTHROPIC: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 3,
    "messages": [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "tool_use", "id": "t", "name": "look_up", "input": {"word": "b"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t",
                    "content": [{"type": "text", "text": "1"}],
                }
            ],
        },
    ],
    "system": [{"type": "text", "text": "be short", "cache_control": {"type": "ephemeral"}}],
    "stream": True,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "stop_sequences": ["x"],
    "tools": [{"name": "look_up", "input_schema": TOOL["parameters"]}],
    "tool_choice": {"type": "auto"},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "metadata": {"user_id": "u"},
}
RESPONSE: dict[str, Any] = {
    "model": MODEL,
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "function_call", "call_id": "c", "name": "look_up", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
    ],
    "instructions": "be short",
    "max_output_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "stream": True,
    "store": True,
    "previous_response_id": "resp_1",
    "tools": [{"type": "function", **TOOL}],
    "tool_choice": "auto",
    "reasoning": {"effort": "low"},
    "text": {"format": {"type": "json_object"}},
    "include": ["reasoning.encrypted_content"],
    "truncation": "auto",
}
GENERATE: dict[str, Any] = {
    "text": "hello",
    "input_ids": [1, 2],
    "stream": False,
    "sampling_params": {
        "max_new_tokens": 3,
        "temperature": 0.5,
        "top_k": 3,
        "n": 2,
        "stop": ["x"],
        "regex": "[ab]+",
        "json_schema": '{"type": "object"}',
        "logit_bias": {"3": 1.0},
    },
    "priority": 1,
    "rid": "r",
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/v1/messages": ANTHROPIC,
    "/v1/messages/count_tokens": ANTHROPIC,
    "/v1/responses": RESPONSE,
    "/generate": GENERATE,
    "/tokenize": {
        "model": MODEL,
        "prompt": "hello",
        "messages": CHAT["messages"],
        "add_special_tokens": True,
        "return_token_strs": True,
        "tools": CHAT_TOOLS,
        "chat_template_kwargs": {"a": 1},
    },
    "/detokenize": {"model": MODEL, "tokens": [1, 2, 3]},
}
NEEDED = frozenset(
    ("model", "prompt", "messages", "max_tokens", "input", "max_output_tokens", "text", "tokens")
)
"""Fields that mostly stay: without them a body is refused before anything else is read."""
HEADERS = (
    "Last-Event-ID",
    "X-Request-Id",
    "X-Request-Timeout",
    "traceparent",
    "Content-Type",
    "Content-Encoding",
    "Accept",
    "Origin",
)
"""What else of a request is read."""
