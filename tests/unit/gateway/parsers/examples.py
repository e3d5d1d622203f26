"""Models' texts with what they say: the formats of the families that are served, as their chat
templates and published answers write them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Call = tuple[str, str]
"""A tool's name and the arguments as they are passed on."""

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "ratio": {"type": "number"},
        "metric": {"type": "boolean"},
        "tags": {"type": "array"},
        "nested": {"type": "object"},
        "note": {"type": ["string", "null"]},
        "code": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
    },
}
SCHEMAS = {"get_weather": WEATHER}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """`opened`: where the prompt leaves the reasoning, as in `output_parser`."""

    name: str
    text: str
    tools: str | None = None
    reasoning: str | None = None
    opened: bool | None = None
    content: str = ""
    thought: str = ""
    calls: list[Call] = field(default_factory=list)


def _dsml(*lines: str) -> str:
    return "\n".join(lines).replace("D:", "｜DSML｜")


EXAMPLES = [
    Example(
        name="Qwen3: no reasoning, whose end was forced",
        reasoning="qwen3",
        opened=True,
        text="</think>\n\nYes.",
        content="Yes.",
    ),
    Example(
        name="Qwen3: empty reasoning",
        reasoning="qwen3",
        text="<think></think>\n\nYes.",
        content="Yes.",
    ),
    Example(
        name="hermes",
        tools="hermes",
        text='Let me look.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}'
        "\n</tool_call>",
        content="Let me look.",
        calls=[("get_weather", '{"city": "Paris"}')],
    ),
    Example(
        name="hermes: two calls, nested braces, quotes and markers in strings",
        tools="hermes",
        text='<tool_call>\n{"name": "a", "arguments": {"x": {"y": [1, {"z": "}]\\"</tool_call>"}]}}'
        '}\n</tool_call>\n<tool_call>\n{"name":"b","arguments":{}}\n</tool_call>\n',
        calls=[("a", '{"x": {"y": [1, {"z": "}]\\"</tool_call>"}]}}'), ("b", "{}")],
    ),
    Example(
        name="hermes: unicode",
        tools="hermes",
        text='Voilà 🌦 <tool_call>{"name": "wetter", "arguments": {"ort": "Köln 東京 🗼'
        '\\ud83d\\ude00"}}</tool_call>',
        content="Voilà 🌦",
        calls=[("wetter", '{"ort": "Köln 東京 🗼\\ud83d\\ude00"}')],
    ),
    Example(
        name="hermes: arguments before the name, another key, a call without arguments",
        tools="hermes",
        text='<tool_call>{"id": 7, "arguments": {"x": [1]}, "name": "a"}</tool_call>'
        '<tool_call>{"name": "b"}</tool_call>',
        calls=[("a", '{"x": [1]}'), ("b", "{}")],
    ),
    Example(
        name="hermes: arguments as a string of JSON",
        tools="hermes",
        text='<tool_call>{"name": "a", "arguments": "{\\"x\\": \\"\\u00e9\\"}"}</tool_call>',
        calls=[("a", '{"x": "é"}')],
    ),
    Example(
        name="hermes: text after a call",
        tools="hermes",
        text='<tool_call>{"name": "a", "arguments": {}}</tool_call>\n\nDone. ',
        content="Done. ",
        calls=[("a", "{}")],
    ),
    Example(
        name="hermes: tags that are text",
        tools="hermes",
        text="Write <tool or <tool_call here: <tool_call>no JSON</tool_call> and a < b. \n",
        content="Write <tool or <tool_call here: <tool_call>no JSON</tool_call> and a < b. \n",
    ),
    Example(
        name="hermes: a malformed call, then a good one",
        tools="hermes",
        text='<tool_call>{"name": "a", "arg</tool_call> <tool_call>{"name": 3}</tool_call>'
        '<tool_call>{"name": "b", "arguments": {"c": 1}}</tool_call>',
        content='<tool_call>{"name": "a", "arg</tool_call> <tool_call>{"name": 3}</tool_call>',
        calls=[("b", '{"c": 1}')],
    ),
    Example(
        name="hermes: arguments that break off",
        tools="hermes",
        text='<tool_call>{"name": "a", "arguments": {"x": 1</tool_call>after',
        content="after",
        calls=[("a", '{"x": 1')],
    ),
    Example(
        name="hermes: cut off in the arguments",
        tools="hermes",
        text='<tool_call>\n{"name": "a", "arguments": {"text": "once upon',
        calls=[("a", '{"text": "once upon')],
    ),
    Example(
        name="hermes: cut off before the call begins",
        tools="hermes",
        text='So: <tool_call>\n{"name": "a',
        content='So: <tool_call>\n{"name": "a',
    ),
    Example(
        name="hermes: cut off in the end tag",
        tools="hermes",
        text='<tool_call>{"name": "a", "arguments": {}}\n</tool_ca',
        calls=[("a", "{}")],
    ),
    Example(
        name="hermes: no call",
        tools="hermes",
        text="  Just text, with white space around it. \n",
        content="  Just text, with white space around it. \n",
    ),
    Example(
        name="Qwen3: reasoning, then a call",
        tools="hermes",
        reasoning="qwen3",
        text='<think>\nThe user wants\n\nrain.\n</think>\n\n<tool_call>\n{"name": "a", '
        '"arguments": {"q": "<think>"}}\n</tool_call>',
        thought="The user wants\n\nrain.",
        calls=[("a", '{"q": "<think>"}')],
    ),
    Example(
        name="Qwen3: thinking turned off by the prompt",
        tools="hermes",
        reasoning="qwen3",
        opened=False,
        text="<think> is a tag.",
        content="<think> is a tag.",
    ),
    Example(
        name="Qwen3-Thinking: the prompt opens the reasoning",
        reasoning="qwen3",
        opened=True,
        text="Hm, </thin or so.\n</think>\n\nThe answer: </think> is a tag.\n",
        thought="Hm, </thin or so.",
        content="The answer: </think> is a tag.\n",
    ),
    Example(
        name="Qwen3: cut off in the reasoning",
        reasoning="qwen3",
        text="<think>\nI should </th",
        thought="I should </th",
    ),
    Example(
        name="Qwen3: no reasoning, and a tag in the middle",
        reasoning="qwen3",
        text=" <thinking> is not <think>it</think>",
        content=" <thinking> is not <think>it</think>",
    ),
    Example(
        name="DeepSeek R1: reasoning without an opening tag",
        reasoning="deepseek_r1",
        text="First, 1 < 2.</think>\n\nYes.",
        thought="First, 1 < 2.",
        content="Yes.",
    ),
    Example(
        name="DeepSeek R1: the opening tag is written all the same",
        reasoning="deepseek_r1",
        text="<think>\nFirst.\n</think>\nYes.",
        thought="First.",
        content="Yes.",
    ),
    Example(
        name="Magistral",
        reasoning="mistral",
        text="[THINK]Add them.[/THINK]It is [4].",
        thought="Add them.",
        content="It is [4].",
    ),
    Example(
        name="Qwen3-Coder",
        tools="qwen3_coder",
        text='I\'ll check.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nNew "York" '
        "<NY>\nline 2\n</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=metric>\nTrue\n"
        "</parameter>\n</function>\n</tool_call>",
        content="I'll check.",
        calls=[
            (
                "get_weather",
                '{"city": "New \\"York\\" <NY>\\nline 2", "days": 3, "metric": true}',
            )
        ],
    ),
    Example(
        name="Qwen3-Coder: types by the schema",
        tools="qwen3_coder",
        text="<tool_call>\n<function=get_weather>\n<parameter=city>\n5\n</parameter>\n"
        "<parameter=ratio>\n5\n</parameter>\n<parameter=days>\nfive\n</parameter>\n"
        '<parameter=nested>\n{"a": [1, 2]}\n</parameter>\n<parameter=note>\nnull\n</parameter>\n'
        "<parameter=code>\n7\n</parameter>\n<parameter=tags>\n[broken\n</parameter>\n"
        "<parameter=unknown>\nNaN\n</parameter>\n</function>\n</tool_call>",
        calls=[
            (
                "get_weather",
                '{"city": "5", "ratio": 5, "days": "five", "nested": {"a": [1, 2]}, '
                '"note": null, "code": 7, "tags": "[broken", "unknown": "NaN"}',
            )
        ],
    ),
    Example(
        name="Qwen3-Coder: two calls, the opening tag forgotten, no parameters",
        tools="qwen3_coder",
        text="<function=now>\n</function>\n</tool_call>\n<tool_call>\n<function=get_weather>\n"
        "<parameter=city>\nOslo\n\n</parameter>\n</function>\n</tool_call>",
        calls=[("now", "{}"), ("get_weather", '{"city": "Oslo\\n"}')],
    ),
    Example(
        name="Qwen3-Coder: calls as JSON",
        tools="qwen3_coder",
        text='<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>',
        calls=[("get_weather", '{"city": "Rome"}')],
    ),
    Example(
        name="Qwen3-Coder: malformed",
        tools="qwen3_coder",
        text="<tool_call>\n<functio=x>\n</tool_call> <function= > f",
        content="<tool_call>\n<functio=x>\n</tool_call> <function= > f",
    ),
    Example(
        name="Qwen3-Coder: cut off in a value",
        tools="qwen3_coder",
        text="<tool_call>\n<function=get_weather>\n<parameter=city>\nNew Yo",
        calls=[("get_weather", '{"city": "New Yo')],
    ),
    Example(
        name="Qwen3-Coder: cut off in a number",
        tools="qwen3_coder",
        text="<tool_call>\n<function=get_weather>\n<parameter=city>\nX\n</parameter>\n"
        "<parameter=days>\n12",
        calls=[("get_weather", '{"city": "X", "days": 12')],
    ),
    Example(
        name="Qwen3-Coder: cut off between parameters",
        tools="qwen3_coder",
        text="<tool_call>\n<function=get_weather>\n<parameter=city>\nX\n</parameter>\n</func",
        calls=[("get_weather", '{"city": "X"')],
    ),
    Example(
        name="Qwen3-Coder: something else between parameters",
        tools="qwen3_coder",
        text="<function=get_weather>\n<parameter=city>\nX\n</parameter>\nand so on",
        content="and so on",
        calls=[("get_weather", '{"city": "X"}')],
    ),
    Example(
        name="GLM-4.5",
        tools="glm45",
        reasoning="glm45",
        text="<think>Weather.</think>\nLooking.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
        "<arg_value>北京 & <b></arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n"
        "</tool_call>\n<tool_call>now\n</tool_call>",
        thought="Weather.",
        content="Looking.",
        calls=[("get_weather", '{"city": "北京 & <b>", "days": 2}'), ("now", "{}")],
    ),
    Example(
        name="GLM-4.7: without line breaks",
        tools="glm45",
        text="<tool_call>get_weather<arg_key>city</arg_key><arg_value>Ulm</arg_value></tool_call>"
        "<tool_call>now</tool_call>",
        calls=[("get_weather", '{"city": "Ulm"}'), ("now", "{}")],
    ),
    Example(
        name="GLM: malformed",
        tools="glm45",
        text="The <tool_call> tag\nopens. <tool_call>{}",
        content="The <tool_call> tag\nopens. <tool_call>{}",
    ),
    Example(
        name="GLM: cut off",
        tools="glm45",
        text="<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_val",
        calls=[("get_weather", "")],
    ),
    Example(
        name="Mistral: a list",
        tools="mistral",
        text='[TOOL_CALLS] [{"name": "a", "arguments": {"x": "]"}}, {"name": "b", "arguments": {}}'
        "]",
        calls=[("a", '{"x": "]"}'), ("b", "{}")],
    ),
    Example(
        name="Mistral: a name before the arguments",
        tools="mistral",
        text='Sure [1].[TOOL_CALLS]a[ARGS]{"x": [1]}[TOOL_CALLS]b[CALL_ID]abcdefghi[ARGS]{}'
        '[TOOL_CALLS]c{"y": 2}',
        content="Sure [1].",
        calls=[("a", '{"x": [1]}'), ("b", "{}"), ("c", '{"y": 2}')],
    ),
    Example(
        name="Mistral: malformed",
        tools="mistral",
        text="[TOOL_CALLS] [] and [TOOL_CALLS]no call",
        content="[TOOL_CALLS] [] and [TOOL_CALLS]no call",
    ),
    Example(
        name="Mistral: a list that breaks off",
        tools="mistral",
        text='[TOOL_CALLS][{"name": "a", "arguments": {}}, {"nam',
        content=', {"nam',
        calls=[("a", "{}")],
    ),
    Example(
        name="DeepSeek V3",
        tools="deepseek_v3",
        text="Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
        'get_weather\n```json\n{"city": "Hangzhou\\n```"}\n```'
        "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        content="Let me see.",
        calls=[("get_weather", '{"city": "Hangzhou\\n```"}'), ("now", "{}")],
    ),
    Example(
        name="DeepSeek V3: malformed",
        tools="deepseek_v3",
        text="<｜tool▁calls▁begin｜>none<｜tool▁calls▁end｜> <｜tool▁call▁begin｜>function",
        content="<｜tool▁calls▁begin｜>none<｜tool▁calls▁end｜> <｜tool▁call▁begin｜>function",
    ),
    Example(
        name="DeepSeek V3.1",
        tools="deepseek_v31",
        reasoning="deepseek_v3",
        opened=True,
        text="Hm.</think>Now:<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"city": "Wien"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        thought="Hm.",
        content="Now:",
        calls=[("get_weather", '{"city": "Wien"}'), ("now", "{}")],
    ),
    Example(
        name="DeepSeek V3.1: cut off",
        tools="deepseek_v31",
        text="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁ca",
        calls=[("now", "{}<｜tool▁ca")],
    ),
    Example(
        name="DeepSeek V3.2",
        tools="deepseek_v32",
        reasoning="deepseek_v3",
        opened=True,
        text=_dsml(
            "Two calls.</think>I will ask.",
            "",
            "<D:function_calls>",
            '<D:invoke name="get_weather">',
            '<D:parameter name="city" string="true">San "José"</D:parameter>',
            '<D:parameter name="days" string="false">2</D:parameter>',
            '<D:parameter name="tags" string="false">["a", {"b": 1}]</D:parameter>',
            "</D:invoke>",
            '<D:invoke name="now">',
            "</D:invoke>",
            "</D:function_calls>",
        ),
        thought="Two calls.",
        content="I will ask.",
        calls=[
            ("get_weather", '{"city": "San \\"José\\"", "days": 2, "tags": ["a", {"b": 1}]}'),
            ("now", "{}"),
        ],
    ),
    Example(
        name="DeepSeek V3.2: malformed",
        tools="deepseek_v32",
        text=_dsml("<D:function_calls>nothing</D:function_calls> <D:invoke nam"),
        content=_dsml("<D:function_calls>nothing</D:function_calls> <D:invoke nam"),
    ),
    Example(
        name="gpt-oss: reasoning and answer",
        tools="openai",
        reasoning="openai_gptoss",
        text="<|channel|>analysis<|message|>Simple <sum>.<|end|><|start|>assistant<|channel|>final"
        "<|message|>It is 4.\n",
        thought="Simple <sum>.",
        content="It is 4.\n",
    ),
    Example(
        name="gpt-oss: reasoning, a preamble, calls",
        tools="openai",
        reasoning="openai_gptoss",
        text="<|channel|>analysis<|message|>Need both.<|end|><|start|>assistant<|channel|>"
        "commentary<|message|>I will look.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city":"Tokyo"}<|call|>'
        "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}",
        thought="Need both.",
        content="I will look.",
        calls=[("get_weather", '{"city":"Tokyo"}'), ("now", "{}")],
    ),
    Example(
        name="gpt-oss: the recipient comes first, and an end is forgotten",
        tools="openai",
        text=" to=functions.now<|channel|>commentary<|message|>{}<|start|>assistant<|channel|>final"
        "<|message|>Done",
        content="Done",
        calls=[("now", "{}")],
    ),
    Example(
        name="gpt-oss: two pieces of reasoning",
        reasoning="openai_gptoss",
        text="<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>analysis"
        "<|message|>Two.<|end|><|start|>assistant<|channel|>final<|message|>A<|end|><|start|>"
        "assistant<|channel|>final<|message|>B",
        thought="One.\nTwo.",
        content="A\nB",
    ),
    Example(
        name="gpt-oss: a call without tools is content",
        reasoning="openai_gptoss",
        text="<|channel|>commentary to=functions.x <|constrain|>json<|message|>{}<|call|>",
        content="{}",
    ),
    Example(
        name="gpt-oss: no messages",
        reasoning="openai_gptoss",
        text="Plain to= text <|chan <|channel|>without end",
        content="Plain to= text <|chan <|channel|>without end",
    ),
]
