"""The formats in which models write tool calls and reasoning, by vLLM's names, and which one a
model uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from gateway.parsers import harmony, json_formats, xml_formats
from gateway.parsers.harmony import parse_harmony
from gateway.parsers.output_parser import OutputParser
from gateway.parsers.reasoning import parse_reasoning
from gateway.parsers.source import Parse, Source
from gateway.parsers.xml_formats import Tools
from shared.errors import ConfigError

HARMONY = "openai"
NONE = "none"
AUTO = "auto"

F = TypeVar("F")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How a model writes calls. `markers` are strings that its tokenizer may hold as special
    tokens. `guided` names the format in which calls that are forced are written: those of XML-like
    formats as JSON, so that a schema can guide them; `parse_guided` reads these."""

    name: str
    parse: Callable[[Source, Tools], Parse]
    markers: tuple[str, ...]
    guided: str
    parse_guided: Callable[[Source], Parse]
    call_id_chars: int = 24
    call_id_prefix: str = "call_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFormat:
    """Reasoning stands between `start` and `end`. `implicit`: it needs no `start`. To end it early,
    `forced_end` is written."""

    name: str
    start: str
    end: str
    implicit: bool = False
    forced_end: str = ""

    @property
    def is_harmony(self) -> bool:
        return self.start == _ANALYSIS


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFormats:
    """Of one model. None: it has no calls, or no reasoning, to be split off."""

    tools: ToolFormat | None
    reasoning: ReasoningFormat | None

    def markers(self) -> frozenset[str]:
        """Strings that a parser must see, even where they are special tokens."""
        tools = self.tools.markers if self.tools is not None else ()
        reasoning = self.reasoning
        if reasoning is None:
            return frozenset(tools)
        own = _HARMONY_MARKERS if reasoning.is_harmony else (reasoning.start, reasoning.end)
        return frozenset((*tools, *own))


def _without_schema(parse: Callable[[Source], Parse]) -> Callable[[Source, Tools], Parse]:
    return lambda source, _tools: parse(source)


_ANALYSIS = harmony.CHANNEL + "analysis" + harmony.MESSAGE
_HARMONY_MARKERS = (
    *(harmony.START, harmony.CHANNEL, harmony.CONSTRAIN, harmony.MESSAGE),
    *(harmony.END, harmony.CALL, harmony.RETURN),
)
_TOOL_CALL_MARKERS = (json_formats.TOOL_CALL, json_formats.TOOL_CALL_END)
_DEEPSEEK_MARKERS = (
    *(json_formats.CALLS_BEGIN, json_formats.CALLS_END, json_formats.CALL_BEGIN),
    *(json_formats.CALL_END, json_formats.SEPARATOR),
)
_HERMES = ToolFormat(
    name="hermes",
    parse=_without_schema(json_formats.parse_hermes),
    markers=_TOOL_CALL_MARKERS,
    guided="hermes",
    parse_guided=json_formats.parse_hermes,
)
_QWEN3_CODER = ToolFormat(
    name="qwen3_coder",
    parse=xml_formats.parse_qwen3_coder,
    markers=_TOOL_CALL_MARKERS,
    guided="hermes",
    parse_guided=json_formats.parse_hermes,
)
_GLM = ToolFormat(
    name="glm45",
    parse=xml_formats.parse_glm,
    markers=(
        *_TOOL_CALL_MARKERS,
        *(xml_formats.ARG_KEY, xml_formats.ARG_KEY_END),
        *(xml_formats.ARG_VALUE, xml_formats.ARG_VALUE_END),
    ),
    guided="hermes",
    parse_guided=json_formats.parse_hermes,
)
_MISTRAL = ToolFormat(
    name="mistral",
    parse=_without_schema(json_formats.parse_mistral),
    markers=(json_formats.TOOL_CALLS, json_formats.ARGS, json_formats.CALL_ID),
    guided="mistral",
    parse_guided=json_formats.parse_mistral,
    call_id_chars=9,  # Mistral's templates refuse any other length
    call_id_prefix="",
)
_DEEPSEEK_V3 = ToolFormat(
    name="deepseek_v3",
    parse=_without_schema(json_formats.parse_deepseek_v3),
    markers=_DEEPSEEK_MARKERS,
    guided="deepseek_v3",
    parse_guided=partial(json_formats.parse_deepseek_v3, guided=True),
)
_DEEPSEEK_V31 = ToolFormat(
    name="deepseek_v31",
    parse=_without_schema(json_formats.parse_deepseek_v31),
    markers=_DEEPSEEK_MARKERS,
    guided="deepseek_v31",
    parse_guided=partial(json_formats.parse_deepseek_v31, guided=True),
)
_DEEPSEEK_V32 = ToolFormat(
    name="deepseek_v32",
    parse=xml_formats.parse_deepseek_v32,
    markers=("｜DSML｜",),
    guided="hermes",
    parse_guided=json_formats.parse_hermes,
)
_HARMONY = ToolFormat(
    name=HARMONY,
    parse=_without_schema(partial(parse_harmony, calls=True)),
    markers=_HARMONY_MARKERS,
    guided=HARMONY,
    parse_guided=partial(parse_harmony, calls=True, guided=True),
)

TOOL_FORMATS: dict[str, ToolFormat] = {
    "hermes": _HERMES,
    "qwen3_coder": _QWEN3_CODER,
    "qwen3_xml": _QWEN3_CODER,
    "glm45": _GLM,
    "glm47": _GLM,
    "mistral": _MISTRAL,
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v31": _DEEPSEEK_V31,
    "deepseek_v32": _DEEPSEEK_V32,
    HARMONY: _HARMONY,
}
"""By vLLM's names of its `--tool-call-parser`."""

_THINK, _THINK_END = "<think>", "</think>"
REASONING_FORMATS: dict[str, ReasoningFormat] = {
    **{
        name: ReasoningFormat(name=name, start=_THINK, end=_THINK_END, forced_end=_THINK_END)
        for name in ("qwen3", "glm45", "deepseek_v3")
    },
    "deepseek_r1": ReasoningFormat(
        name="deepseek_r1",
        start=_THINK,
        end=_THINK_END,
        implicit=True,
        forced_end=_THINK_END,
    ),
    "mistral": ReasoningFormat(
        name="mistral", start="[THINK]", end="[/THINK]", forced_end="[/THINK]"
    ),
    "openai_gptoss": ReasoningFormat(
        name="openai_gptoss",
        start=_ANALYSIS,
        end=harmony.END,
        forced_end=harmony.END
        + harmony.START
        + "assistant"
        + harmony.CHANNEL
        + "final"
        + harmony.MESSAGE,
    ),
}
"""By vLLM's names of its `--reasoning-parser`."""


def choose_formats(
    *, template: str, model_type: str, tool_parser: str = AUTO, reasoning_parser: str = AUTO
) -> OutputFormats:
    """`template` is the source of the model's chat template, `model_type` the config's. Raises
    ConfigError for an unknown name of a parser."""
    tools: ToolFormat | None = _detect_tools(template, model_type)
    if tool_parser != AUTO:
        tools = _named(TOOL_FORMATS, tool_parser, "--tool-call-parser")
    reasoning = _detect_reasoning(template, model_type)
    if reasoning_parser != AUTO:
        reasoning = _named(REASONING_FORMATS, reasoning_parser, "--reasoning-parser")
    return OutputFormats(tools=tools, reasoning=reasoning)


def check_parser_names(tool_parser: str, reasoning_parser: str) -> None:
    """Raises ConfigError."""
    choose_formats(
        template="", model_type="", tool_parser=tool_parser, reasoning_parser=reasoning_parser
    )


def _named(formats: dict[str, F], name: str, flag: str) -> F | None:
    if name == NONE:
        return None
    if name not in formats:
        known = ", ".join((AUTO, NONE, *formats))
        raise ConfigError(f"{flag} {name!r}: pass one of {known}")
    return formats[name]


def _detect_tools(template: str, model_type: str) -> ToolFormat:
    """Hermes, the most common, if the template shows no calls."""
    signs: tuple[tuple[bool, ToolFormat], ...] = (
        (harmony.CHANNEL in template or model_type == "gpt_oss", _HARMONY),
        ("｜DSML｜" in template or model_type == "deepseek_v32", _DEEPSEEK_V32),
        (json_formats.CALLS_BEGIN in template and "```json" in template, _DEEPSEEK_V3),
        (json_formats.CALLS_BEGIN in template, _DEEPSEEK_V31),
        (xml_formats.FUNCTION in template, _QWEN3_CODER),
        (xml_formats.ARG_KEY in template, _GLM),
        (json_formats.TOOL_CALLS in template, _MISTRAL),
    )
    return next((found for sign, found in signs if sign), _HERMES)


def _detect_reasoning(template: str, model_type: str) -> ReasoningFormat | None:
    if harmony.CHANNEL in template or model_type == "gpt_oss":
        return REASONING_FORMATS["openai_gptoss"]
    if "[THINK]" in template:
        return REASONING_FORMATS["mistral"]
    if _THINK_END in template or model_type == "deepseek_v32":
        if xml_formats.ARG_KEY in template:
            return REASONING_FORMATS["glm45"]
        deepseek = model_type.startswith("deepseek")
        return REASONING_FORMATS["deepseek_v3" if deepseek else "qwen3"]
    return None


def output_parser(
    *,
    tools: ToolFormat | None,
    reasoning: ReasoningFormat | None,
    schemas: Tools,
    opened: bool | None,
    calls_max: int | None,
    guided: bool = False,
) -> OutputParser | None:
    """The parser of one choice, or None if its text is all content. `opened` says whether the
    prompt ends inside the reasoning (True) or after its end (False); None: it does neither.
    `guided`: what follows the reasoning has the form of a grammar.

    Messages of harmony hold both, so one parser splits them."""
    if (tools is not None and tools.name == HARMONY) or (
        reasoning is not None and reasoning.is_harmony
    ):
        first = partial(parse_harmony, calls=tools is not None, guided=guided)
        return OutputParser(first=first, then=None, calls_max=calls_max)
    think = None
    if reasoning is not None and opened is not False:
        begins_inside = bool(opened) or reasoning.implicit
        think = partial(
            parse_reasoning, start=reasoning.start, end=reasoning.end, opened=begins_inside
        )
    if think is None and tools is None:
        return None
    return OutputParser(
        first=think, then=_call_parser(tools, schemas, guided=guided), calls_max=calls_max
    )


def _call_parser(
    tools: ToolFormat | None, schemas: Tools, *, guided: bool
) -> Callable[[Source], Parse] | None:
    if tools is None:
        return None
    return tools.parse_guided if guided else (lambda source: tools.parse(source, schemas))
