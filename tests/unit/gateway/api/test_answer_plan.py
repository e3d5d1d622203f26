"""Grammars of answers with calls and reasoning: what they allow is what the parsers read, for every
format, and arguments always follow the tools' schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken

from gateway.api.answer_plan import AnswerPlan
from gateway.api.tools import NO_TOOLS, ToolMode, ToolRequest
from gateway.detokenizer import TokenBytes, TokenNames
from gateway.parsers.formats import REASONING_FORMATS, TOOL_FORMATS, OutputFormats
from shared.errors import RequestError
from shared.types import FinishReason
from tests.support.tiny_tokenizer import build_tokenizer

SCHEMAS: Mapping[str, Mapping[str, Any]] = {
    "f": {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    },
    "g": {"type": "object", "properties": {}, "additionalProperties": False},
}
ADDED = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<|channel|>", "<|message|>")
FORM = json.dumps({"grammars": [{"json_schema": {"type": "object", "properties": {}}}]})


class Model:
    """A tokenizer; `added` are tokens of its own."""

    def __init__(self, folder: Path, added: tuple[str, ...]) -> None:
        self.tokenizer = build_tokenizer()
        self.tokenizer.add_tokens([AddedToken(text, special=False) for text in added])
        path = folder / "tokenizer.json"
        self.tokenizer.save(str(path))
        self.guidance = LLTokenizer(str(path), eos_token=[0])
        # "<|end|>" is one of the special tokens that it always has.
        self.ids = {text: self.tokenizer.token_to_id(text) for text in (*added, "<|end|>")}
        token_bytes = TokenBytes(self.tokenizer.get_vocab(), frozenset())
        self.names = TokenNames(token_bytes, token_bytes)

    def follows(self, grammar: str, text: str) -> bool:
        """Whether the whole text does, and may end then."""
        error = LLMatcher.validate_grammar(grammar)
        assert not error, error
        matcher = LLMatcher(self.guidance, grammar, log_level=0)
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def message(self, plan: AnswerPlan, text: str) -> dict[str, Any]:
        reader = plan.reader(self.names, (), answer="a", choice=0)
        assert reader is not None
        for char in text:
            reader.feed(char, (), None)
        reader.feed("", (), FinishReason.STOP)
        return reader.message()


@pytest.fixture(params=[(), ADDED], ids=["texts", "tokens"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    return Model(tmp_path, request.param)


def plan(
    tools: str,
    reasoning: str | None = None,
    *,
    mode: ToolMode = ToolMode.REQUIRED,
    calls_max: int | None = 4,
    opened: bool | None = None,
    demands_form: bool = False,
) -> AnswerPlan:
    request = ToolRequest(mode=mode, tools=({},), schemas=SCHEMAS, calls_max=calls_max)
    return AnswerPlan(
        formats=OutputFormats(
            tools=TOOL_FORMATS[tools],
            reasoning=None if reasoning is None else REASONING_FORMATS[reasoning],
        ),
        tools=NO_TOOLS if mode is ToolMode.NONE else request,
        opened=opened,
        demands_form=demands_form,
    )


def hermes(*calls: tuple[str, str]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in calls
    )


DEEPSEEK = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
ONE_CALL = {
    "hermes": hermes(("f", '{"n": 7}')),
    "qwen3_coder": hermes(("f", '{"n": 7}')),
    "glm45": hermes(("f", '{"n": 7}')),
    "deepseek_v32": hermes(("f", '{"n": 7}')),
    "mistral": '[TOOL_CALLS][{"name": "f", "arguments": {"n": 7}}]',
    "deepseek_v3": DEEPSEEK.format('function<｜tool▁sep｜>f\n```json\n{"n": 7}\n```'),
    "deepseek_v31": DEEPSEEK.format('f<｜tool▁sep｜>{"n": 7}'),
    "openai": '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"n": 7}',
}


@pytest.mark.parametrize("name", sorted(ONE_CALL))
def test_a_call_that_is_forced_is_one_that_is_read(model: Model, name: str) -> None:
    forced = plan(name)
    grammar = forced.grammar("", model.ids.get)
    assert model.follows(grammar, ONE_CALL[name])
    message = model.message(forced, ONE_CALL[name])
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"n": 7}'}
    assert message["content"] is None
    for wrong in ('{"n": "7"}', '{"m": 7}', '{"n": 7, "m": 1}', "{}", '{"n": 7', '{"n": 7.5}'):
        assert not model.follows(grammar, ONE_CALL[name].replace('{"n": 7}', wrong))
    assert not model.follows(grammar, ONE_CALL[name].replace("f", "h", 1))
    assert not model.follows(grammar, "No.")
    assert not model.follows(grammar, "")


@pytest.mark.parametrize("name", sorted(ONE_CALL))
def test_a_marker_that_forced_arguments_spell_is_text(model: Model, name: str) -> None:
    texts = ("<|end|>", "<|call|>", "<|channel|>", "</tool_call>", "<tool_call>", "[TOOL_CALLS]")
    arguments = json.dumps({"n": "".join((*texts, "<｜tool▁call▁end｜>", "\n```", "y"))})
    message = model.message(plan(name), ONE_CALL[name].replace('{"n": 7}', arguments))
    (call,) = message["tool_calls"]
    assert call["function"]["arguments"] == arguments
    assert message["content"] is None


def test_a_marker_that_a_demanded_form_spells_is_text(model: Model) -> None:
    form = plan("openai", "openai_gptoss", mode=ToolMode.NONE, demands_form=True)
    before = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    message = model.message(form, before + "<|channel|>final<|message|>a<|end|>b<|channel|>c")
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "a<|end|>b<|channel|>c")


def test_the_number_of_calls_is_limited(model: Model) -> None:
    one, four = (plan("hermes", calls_max=n).grammar("", model.ids.get) for n in (1, 4))
    calls = [hermes(*[("g", "{}")] * count) for count in range(6)]
    assert [model.follows(one, text) for text in calls] == [False, True, *[False] * 4]
    assert [model.follows(four, text) for text in calls] == [False, *[True] * 4, False]


@pytest.mark.parametrize(
    ("reasoning", "opened", "before", "allowed"),
    [
        ("qwen3", None, "<think>\nHm </thin.\n</think>\n\n", True),
        ("qwen3", None, "", True),
        ("qwen3", None, "Hm.</think>", False),
        ("qwen3", True, "Hm.</think>\n\n", True),
        ("qwen3", True, "", False),
        ("qwen3", False, "", True),
        ("qwen3", False, "<think>Hm.</think>", False),
        ("deepseek_r1", None, "Hm.</think>", True),
        (None, None, "<think>Hm.</think>", False),
    ],
)
def test_reasoning_may_come_before_what_is_forced(
    model: Model, reasoning: str | None, opened: bool | None, before: str, allowed: bool
) -> None:
    call = hermes(("g", "{}"))
    forced = plan("hermes", reasoning, opened=opened)
    assert model.follows(forced.grammar("", model.ids.get), before + call) is allowed
    form = plan("hermes", reasoning, mode=ToolMode.NONE, opened=opened, demands_form=True)
    assert model.follows(form.grammar(FORM, model.ids.get), before + "{}") is allowed
    if allowed and before:
        message = model.message(forced, before + call)
        assert message["reasoning_content"].startswith("Hm")
        assert len(message["tool_calls"]) == 1


def test_harmony_reasons_before_a_call_and_before_a_form(model: Model) -> None:
    before = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    forced = plan("openai", "openai_gptoss")
    assert model.follows(forced.grammar("", model.ids.get), before + ONE_CALL["openai"])
    assert model.message(forced, before + ONE_CALL["openai"])["reasoning_content"] == "Hm."
    form = plan("openai", "openai_gptoss", mode=ToolMode.NONE, demands_form=True)
    grammar = form.grammar(FORM, model.ids.get)
    for start in ("", before):
        assert model.follows(grammar, start + "<|channel|>final<|message|>{}")
    assert not model.follows(grammar, "{}")


def test_an_answer_is_a_form_or_calls_when_it_may_be_either(model: Model) -> None:
    either = plan("glm45", "qwen3", mode=ToolMode.AUTO, calls_max=None, demands_form=True)
    grammar = either.grammar(FORM, model.ids.get)
    for before in ("", "<think>Hm.</think>\n"):
        assert model.follows(grammar, before + "{}")
        assert model.follows(grammar, before + hermes(("f", '{"n": 1}'), ("g", "{}")))
    assert not model.follows(grammar, "No.")
    (call,) = model.message(either, hermes(("f", '{"n": 1}')))["tool_calls"]
    assert call["function"]["name"] == "f"


def test_nothing_guides_what_nobody_demands() -> None:
    for mode in (ToolMode.NONE, ToolMode.AUTO):
        free = plan("hermes", "qwen3", mode=mode)
        assert free.grammar("", lambda text: None) == ""
        assert free.calls_grammar(lambda text: None) == ""


def test_a_forced_call_and_a_form_exclude_each_other() -> None:
    with pytest.raises(RequestError) as caught:
        plan("hermes", demands_form=True).grammar(FORM, lambda text: None)
    assert caught.value.param == "tool_choice"


def test_ids_of_calls_are_made_of_the_answers_id_and_their_number(model: Model) -> None:
    text = hermes(("g", "{}"), ("g", "{}"))
    ids = [
        call["id"] for _ in range(2) for call in model.message(plan("hermes"), text)["tool_calls"]
    ]
    assert ids[:2] == ids[2:]
    assert len(set(ids)) == 2
