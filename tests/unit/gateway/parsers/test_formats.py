"""Which formats a model uses, by what its chat template writes, and the names of others."""

from __future__ import annotations

import pytest

from gateway.parsers.formats import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    OutputFormats,
    check_parser_names,
    choose_formats,
)
from shared.errors import ConfigError

HARMONY = "<|start|>assistant<|channel|>analysis<|message|>"
CALLS = "<｜tool▁calls▁begin｜>"


@pytest.mark.parametrize(
    ("template", "model_type", "tools", "reasoning"),
    [
        ("<|im_start|>{{ m.role }}", "qwen3_moe", "hermes", None),
        ("<tool_call>\\n{'name': …} <think></think>", "qwen3_moe", "hermes", "qwen3"),
        ("<tool_call>\\n<function=…><parameter=…>", "qwen3_moe", "qwen3_coder", None),
        ("<tool_call><arg_key></arg_key> </think>", "glm4_moe", "glm45", "glm45"),
        (CALLS + "function\\n```json", "deepseek_v3", "deepseek_v3", None),
        (CALLS + "{{ name }} </think>", "deepseek_v3", "deepseek_v31", "deepseek_v3"),
        ("<｜DSML｜function_calls> </think>", "", "deepseek_v32", "qwen3"),
        ("", "deepseek_v32", "deepseek_v32", "deepseek_v3"),
        (HARMONY, "gpt_oss", "openai", "openai_gptoss"),
        ("", "gpt_oss", "openai", "openai_gptoss"),
        ("[TOOL_CALLS]", "mixtral", "mistral", None),
        ("[TOOL_CALLS] [THINK]", "mistral", "mistral", "mistral"),
        ("", "olmoe", "hermes", None),
    ],
)
def test_a_model_is_read_as_its_template_writes(
    template: str, model_type: str, tools: str, reasoning: str | None
) -> None:
    formats = choose_formats(template=template, model_type=model_type)
    assert formats.tools is TOOL_FORMATS[tools]
    assert formats.reasoning is (None if reasoning is None else REASONING_FORMATS[reasoning])


def test_options_come_before_what_the_template_says() -> None:
    template = "<tool_call> <think></think>"
    none = choose_formats(
        template=template, model_type="", tool_parser="none", reasoning_parser="none"
    )
    assert none == OutputFormats(tools=None, reasoning=None)
    other = choose_formats(
        template=template, model_type="", tool_parser="mistral", reasoning_parser="deepseek_r1"
    )
    assert other.tools is TOOL_FORMATS["mistral"]
    assert other.reasoning is REASONING_FORMATS["deepseek_r1"]


@pytest.mark.parametrize("names", [("llama", "auto"), ("auto", "llama"), ("", "auto")])
def test_unknown_names_are_refused_with_the_known_ones(names: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"pass one of auto, none, "):
        check_parser_names(*names)


def test_markers_are_those_of_both() -> None:
    formats = choose_formats(template="[TOOL_CALLS] [THINK]", model_type="")
    assert {"[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"} <= formats.markers()
    assert choose_formats(template=HARMONY, model_type="").markers() >= {"<|call|>", "<|end|>"}
    assert OutputFormats(tools=None, reasoning=None).markers() == frozenset()
