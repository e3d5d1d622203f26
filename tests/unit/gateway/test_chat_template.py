"""Chat templates render as in transformers: published ones' constructs, options, continued
messages, histories with calls; what cannot be rendered is refused by name."""

from __future__ import annotations

import copy
import functools
import json
from typing import TYPE_CHECKING, Any

import pytest

from gateway.chat_template import ChatOptions, ChatTemplate
from gateway.context_limit import ContextLimit
from shared.clock import SystemClock
from shared.errors import CheckpointError, RequestError
from tests.support.fake_clock import FakeClock
from tests.support.published_templates import (
    ONE_CALL,
    REASONED,
    TEMPLATES,
    TEXT_ARGUMENTS,
    TOOLS,
    TWO_CALLS,
    assistant,
    call,
    result,
    system,
    text_parts,
    user,
)
from tests.support.tiny_tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
THOUGHT = assistant("<think>\nhm\n</think>\n\nIt is here.")
PREFILL = [user(), assistant("It is ")]
STRIPPED = [user(), assistant("It is here. ")]

Case = tuple[str, list[dict[str, Any]], dict[str, Any]]


def case(name: str, messages: list[dict[str, Any]], **options: Any) -> Any:
    label = "-".join([name, *(f"{key}={value!r:.20}" for key, value in options.items())])
    return pytest.param((name, messages, options), id=label)


CASES = [
    case("harmony", [user()]),
    case("harmony", [system(), user()], reasoning_effort="high", model_identity="You are blue."),
    case("harmony", [{"role": "developer", "content": "Be brief."}, user()], tools=TOOLS),
    case("harmony", ONE_CALL, tools=TOOLS),
    case("harmony", [*ONE_CALL[:1], {**ONE_CALL[1], "thinking": "I look."}, ONE_CALL[2]]),
    case("harmony", REASONED, add_generation_prompt=False),
    case("qwen3", [user()]),
    case("qwen3", [system(), user()], enable_thinking=False),
    case("qwen3", [user(), THOUGHT, user("And now?")], add_generation_prompt=False),
    case("qwen3", REASONED, add_generation_prompt=False),
    case("qwen3", ONE_CALL, tools=TOOLS),
    case("qwen3", TWO_CALLS, tools=TOOLS),
    case("qwen3", PREFILL, continue_final_message=True),
    case("qwen3", STRIPPED, continue_final_message=True),
    case("qwen3_coder", [user()]),
    case("qwen3_coder", [system(), user()], tools=TOOLS),
    case("qwen3_coder", ONE_CALL, tools=TOOLS),
    case("qwen3_coder", TWO_CALLS),
    case("glm", [user()]),
    case("glm", [system(text_parts("a", "b")), user(text_parts("c", "d"))]),
    case("glm", [user(text_parts("c")), assistant(text_parts("d")), user()]),
    case("glm", [system(), user(), THOUGHT, user()], enable_thinking=False),
    case("glm", ONE_CALL, tools=TOOLS),
    case("glm", TWO_CALLS, tools=TOOLS),
    case("glm", [*ONE_CALL[:2], result(text_parts("one", "two"))]),
    case("glm", REASONED, add_generation_prompt=False),
    case("deepseek_v3", [system(), user()]),
    case("deepseek_v3", ONE_CALL),
    case("deepseek_v3", TWO_CALLS),
    case("deepseek_v3", [user(), THOUGHT, user()]),
    case("deepseek_v31", [system(), system("More."), user()], thinking=True),
    case("deepseek_v31", ONE_CALL, tools=TOOLS),
    case("deepseek_v31", [user(), assistant("I", prefix=True)], thinking=True),
    case("deepseek_v31", PREFILL, continue_final_message=True),
    case("deepseek_v32", [system(), user()], tools=TOOLS),
    case("deepseek_v32", TWO_CALLS, thinking=True),
    case("deepseek_v32", REASONED, thinking=True, add_generation_prompt=False),
    case("mixtral", [user(), assistant(), user()]),
    case("mixtral", [system(), user()]),
    case("mixtral", PREFILL, continue_final_message=True),
    case("mistral_tools", [user(), assistant(), user()], tools=TOOLS),
    case("mistral_tools", ONE_CALL, tools=TOOLS),
    case("mistral_tools", STRIPPED, continue_final_message=True),
    case("olmoe", [system(), user()]),
    case("olmoe", [user(), assistant()], add_generation_prompt=False),
    case("llama", [system(), user()], date_string="1 Jan 2026"),
    case("llama", [user()]),
    case("llama", ONE_CALL, tools=TOOLS),
    case("llama", STRIPPED, continue_final_message=True),
    case("generation", [system(), user(), system(), assistant(), user("stop"), assistant()]),
    case("generation", [user([*text_parts("a"), {"type": "text", "text": "b", "cache": 1}])]),
    case("generation", [user()], documents=[{"title": "T", "text": "t"}]),
    case("everything", [user(), assistant(None, name="n", custom={"\u00fc": [1, None]})]),
    case("everything", REASONED, eos_token="mine"),
    case("everything", [user(), assistant("x", reasoning="why", refusal=None)]),
]


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast  # takes seconds

    return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(), **NAMES)


@functools.cache
def template(name: str) -> ChatTemplate:
    return ChatTemplate(TEMPLATES.get(name, name), NAMES, SystemClock())


def render(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    fields = ("tools", "documents", "add_generation_prompt", "continue_final_message")
    own = {key: options.pop(key) for key in fields if key in options}
    return template(name).render(messages, ChatOptions(**own, variables=options))


def as_transformers_takes_it(name: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arguments as values, for templates that read values."""
    copied = copy.deepcopy(messages)
    for each in copied:
        for tool_call in each.get("tool_calls", []):
            if name not in TEXT_ARGUMENTS:
                tool_call["function"]["arguments"] = json.loads(tool_call["function"]["arguments"])
    return copied


@pytest.mark.parametrize("each", CASES)
def test_the_prompt_is_that_of_transformers(reference: PreTrainedTokenizerBase, each: Case) -> None:
    name, messages, options = each
    wanted = {"add_generation_prompt": not options.get("continue_final_message"), **options}
    before = render(name, messages, **options)
    expected = reference.apply_chat_template(
        as_transformers_takes_it(name, messages),
        chat_template=TEMPLATES[name],
        tokenize=False,
        **wanted,
    )
    # A template may show the date, and midnight may have passed.
    assert expected in (before, render(name, messages, **options))
    assert len(expected) > 20


@pytest.mark.parametrize("name", ["qwen3", "qwen3_coder", "mixtral", "olmoe", "llama", "harmony"])
def test_parts_become_one_text_where_a_template_reads_texts(name: str) -> None:
    parts = [user(text_parts("one ", "two"))]
    assert render(name, parts) == render(name, [user("one two")])


@pytest.mark.parametrize("arguments", ["", "null", None, "{}"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_coder", "glm", "deepseek_v3", "deepseek_v31"])
def test_no_arguments_are_an_empty_object(name: str, arguments: str | None) -> None:
    function = {"name": "f", "arguments": arguments}
    messages = [
        user(),
        assistant("", tool_calls=[{"id": "call00001", "type": "function", "function": function}]),
        result(),
    ]
    empty = copy.deepcopy(messages)
    empty[1]["tool_calls"][0]["function"]["arguments"] = {}
    prompt = render(name, messages)
    assert prompt == render(name, empty)
    assert "null" not in prompt
    assert "None" not in prompt


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("arguments", ['{"name": "a', "{", "[1]", '"x"', "NaN", 5, "[" * 99_999])
def test_arguments_that_are_no_object_are_refused(name: str, arguments: Any) -> None:
    with pytest.raises(RequestError, match="arguments") as caught:
        render(name, [user(), assistant("", tool_calls=[call(arguments)]), result()])
    assert caught.value.param == "messages"


def test_values_of_a_template_that_reads_text_are_written_as_json() -> None:
    messages = copy.deepcopy(ONE_CALL)
    messages[1]["tool_calls"][0]["function"]["arguments"] = {"name": "\u2605"}
    assert '{"name":"\u2605"}' in render("deepseek_v3", messages)


def test_null_as_content_is_an_empty_text_where_a_template_adds_to_it() -> None:
    source = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
    assert render(source, [user("a"), assistant(None)]) == "user:a;assistant:;"


def test_an_empty_list_of_calls_is_no_call() -> None:
    assert render("deepseek_v31", [user(), assistant("A", tool_calls=[])]) == render(
        "deepseek_v31", [user(), assistant("A")]
    )


def test_the_generation_prompt_may_be_asked_for_in_both_places() -> None:
    with_it, without = (
        render("qwen3", [user()]),
        render("qwen3", [user()], add_generation_prompt=False),
    )
    assert with_it == without + "<|im_start|>assistant\n"
    options = ChatOptions(variables={"add_generation_prompt": False})
    assert template("qwen3").render([user()], options) == without


def test_the_date_is_the_clocks() -> None:
    shown = ChatTemplate("{{ strftime_now('%Y-%m') }}", {}, FakeClock()).render([user()])
    assert shown == "2023-11"


@pytest.mark.parametrize(
    ("messages", "options", "param"),
    [
        (PREFILL, {"add_generation_prompt": True}, "continue_final_message"),
        ([user(), assistant(None, tool_calls=[call("{}")])], {}, "continue_final_message"),
        ([user(), assistant("<think>x</think>")], {}, "continue_final_message"),
    ],
)
def test_a_message_that_cannot_be_continued_is_refused(
    messages: list[dict[str, Any]], options: dict[str, Any], param: str
) -> None:
    source = "{% for m in messages %}{{ (m.content or '').split('</think>')[0] }}{% endfor %}"
    with pytest.raises(RequestError) as caught:
        render(source, messages, continue_final_message=True, **options)
    assert caught.value.param == param


def test_the_last_part_of_a_list_is_continued() -> None:
    messages = [user(), assistant(text_parts("a", "b "))]
    assert render("glm", messages, continue_final_message=True).endswith("ab")


def test_variables_may_replace_special_tokens_but_no_field() -> None:
    assert render("{{ eos_token }}{{ thinking }}", [user()], thinking="T", eos_token="X") == "XT"
    for name in ("messages", "tools", "chat_template"):
        with pytest.raises(RequestError) as caught:
            template("qwen3").render([user()], ChatOptions(variables={name: []}))
        assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0].content + 1 }}",
        "{{ nothing.at.all }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content | tojson(indent='x', separators=3) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_template_that_refuses_is_the_requests_fault(source: str) -> None:
    with pytest.raises(RequestError, match="chat template") as caught:
        render(source, [user()])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.format.__globals__ }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(RequestError):
        render(source + "{{ raise_exception('empty') }}", [user()])


@pytest.mark.parametrize(
    "source",
    [
        "{{ namespace(_a=1) }}",
        "{{ namespace({'__call__': 1}) }}",
        "{% set ns = namespace(a=1) %}{% set ns.__iter__ = 1 %}",
    ],
)
def test_a_namespace_has_no_names_of_pythons_own(source: str) -> None:
    with pytest.raises(RequestError, match="underscore"):
        render(source, [user()])


def test_a_namespace_takes_any_other_name() -> None:
    assert render("{% set ns = namespace(self=1, a=2) %}{{ ns.self + ns.a }}", [user()]) == "3"


@pytest.mark.parametrize("source", ["{{ 10 ** 5000 }}", "{% if %}", "{{ " + "(" * 9_000])
def test_a_template_that_does_not_compile_is_the_checkpoints_fault(source: str) -> None:
    """Jinja computes constants while it compiles."""
    with pytest.raises(CheckpointError, match="does not compile"):
        render(source, [user()])


def test_messages_that_are_nested_too_deeply_are_refused() -> None:
    deep: Any = "x"
    for _ in range(5_000):
        deep = [deep]
    with pytest.raises(RequestError, match="nested"):
        render("{{ messages | tojson }}", [user(), {"role": "user", "custom": deep}])


def test_a_prompt_that_cannot_fit_is_given_up_while_it_is_written() -> None:
    limit = ContextLimit(tokens_max=100, longest_token=10)
    source = "{% for i in range(100) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(RequestError) as caught:
        template(source).render([user("x" * 50)], limit=limit)
    assert caught.value.code == "context_length_exceeded"


def test_a_template_that_writes_for_too_long_is_given_up() -> None:
    class RacingClock(FakeClock):
        def now(self) -> float:
            self.advance(1.0)
            return super().now()

    source = "{% for i in range(9) %}{{ i }}{% endfor %}"
    with pytest.raises(RequestError, match="longer than 5 s"):
        ChatTemplate(source, {}, RacingClock()).render([user()])
