"""Every example at every split: the events joined never depend on how the text was cut."""

from __future__ import annotations

import json
import random
from time import process_time

import pytest

from gateway.parsers.events import CallArguments, CallStart, Content, Event, Reasoning
from gateway.parsers.formats import REASONING_FORMATS, TOOL_FORMATS, output_parser
from gateway.parsers.output_parser import OutputParser
from tests.unit.gateway.parsers.examples import EXAMPLES, SCHEMAS, Call, Example

ALL = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)


def parser_of(example: Example, *, calls_max: int | None = None) -> OutputParser:
    parser = output_parser(
        tools=TOOL_FORMATS[example.tools] if example.tools else None,
        reasoning=REASONING_FORMATS[example.reasoning] if example.reasoning else None,
        schemas=SCHEMAS,
        opened=example.opened,
        calls_max=calls_max,
    )
    assert parser is not None
    return parser


def events_of(parser: OutputParser, pieces: list[str]) -> list[Event]:
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    return events + parser.finish()


def read(events: list[Event]) -> tuple[str, str, list[Call]]:
    """Content, reasoning and calls."""
    content, thought = "", ""
    calls: list[Call] = []
    for event in events:
        match event:
            case Content(text):
                content += text
            case Reasoning(text):
                thought += text
            case CallStart(name):
                calls.append((name, ""))
            case CallArguments(text):
                name, before = calls[-1]
                calls[-1] = (name, before + text)
    return content, thought, calls


@ALL
def test_the_whole_text_gives_what_it_says(example: Example) -> None:
    events = events_of(parser_of(example), [example.text])
    assert read(events) == (example.content, example.thought, example.calls)


@ALL
def test_no_split_into_two_changes_anything(example: Example) -> None:
    wanted = (example.content, example.thought, example.calls)
    for at in range(1, len(example.text)):
        pieces = [example.text[:at], example.text[at:]]
        assert read(events_of(parser_of(example), pieces)) == wanted, pieces


@ALL
def test_what_is_said_after_a_part_of_the_text_does_not_depend_on_its_cuts(
    example: Example,
) -> None:
    """A stream that is resumed in the middle is read at once up to there."""
    rng = random.Random(3)
    stepwise, said = parser_of(example), list[Event]()
    ends = sorted(rng.sample(range(1, len(example.text) + 1), k=min(20, len(example.text))))
    for begin, end in zip([0, *ends], ends, strict=False):
        for char in example.text[begin:end]:
            said += stepwise.feed(char)
        at_once = parser_of(example).feed(example.text[:end])
        assert read(said) == read(at_once), example.text[:end]


@ALL
def test_character_by_character_and_at_random_splits(example: Example) -> None:
    wanted = (example.content, example.thought, example.calls)
    assert read(events_of(parser_of(example), list(example.text))) == wanted
    rng = random.Random(7)
    for _ in range(20):
        cuts = sorted(rng.sample(range(len(example.text) + 1), k=min(6, len(example.text))))
        pieces = [example.text[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        assert read(events_of(parser_of(example), pieces)) == wanted, pieces


@ALL
def test_what_was_shown_is_never_taken_back(example: Example) -> None:
    """Cut off anywhere, an answer begins as the whole one does, but for what is at its very end:
    text that may yet become a marker."""
    whole = parser_of(example)
    shown: list[Event] = []
    for at, char in enumerate(example.text):
        shown += whole.feed(char)
        content, thought, calls = read(shown)
        cut_content, cut_thought, cut_calls = read(
            events_of(parser_of(example), [example.text[: at + 1]])
        )
        assert cut_content.startswith(content)
        assert cut_thought.startswith(thought)
        assert [name for name, _ in cut_calls[: len(calls)]] == [name for name, _ in calls]
        for (_, cut), (_, seen) in zip(cut_calls, calls, strict=False):
            assert cut.startswith(seen)


@ALL
def test_spans_say_where_the_reasoning_is(example: Example) -> None:
    parser = parser_of(example)
    events_of(parser, list(example.text))
    spans = [example.text[begin:end].strip() for begin, end in parser.reasoning_spans]
    assert "\n".join(span for span in spans if span) == example.thought


@ALL
def test_complete_calls_of_well_formed_examples_are_json(example: Example) -> None:
    complete = ("cut off" not in example.name) and ("break" not in example.name)
    for _, arguments in example.calls if complete else []:
        assert isinstance(json.loads(arguments), dict)


def test_the_arguments_come_as_they_are_written() -> None:
    """The name is known before the first argument, and no piece waits for the end."""
    example = next(e for e in EXAMPLES if e.name == "hermes")
    parser = parser_of(example)
    seen = parser.feed('<tool_call>{"name": "a", "arguments": {"te')
    assert seen == [CallStart("a"), CallArguments('{"te')]
    assert parser.feed('xt": "one') == [CallArguments('xt": "one')]
    assert parser.feed(' two"}}') == [CallArguments(' two"}')]


def test_strings_of_xml_formats_come_as_they_are_written() -> None:
    parser = parser_of(next(e for e in EXAMPLES if e.name == "Qwen3-Coder"))
    parser.feed("<tool_call>\n<function=get_weather>\n<parameter=city>\nNew")
    assert parser.feed(" York, the") == [CallArguments(" York, the")]


def test_calls_beyond_the_first_are_left_out_when_only_one_may_be() -> None:
    example = next(e for e in EXAMPLES if len(e.calls) == 2 and e.tools == "glm45")
    content, thought, calls = read(events_of(parser_of(example, calls_max=1), list(example.text)))
    assert (content, thought, calls) == (example.content, example.thought, example.calls[:1])


@pytest.mark.parametrize(
    ("tools", "unit"),
    [
        ("hermes", '<tool_call>{"a":['),
        ("qwen3_coder", "<function="),
        ("mistral", "[TOOL_CALLS]a[CALL_ID]"),
        ("mistral", '[TOOL_CALLS][{"a":['),
        ("deepseek_v3", "<｜tool▁call▁begin｜>"),
        ("deepseek_v31", "<｜tool▁call▁begin｜>"),
        ("deepseek_v32", "<｜DSML｜invoke "),
        ("openai", "<|channel|>"),
    ],
)
def test_markers_that_nothing_follows_are_content_and_cost_little(tools: str, unit: str) -> None:
    """A client has the model write them: each could be the beginning of all that comes after it."""
    hostile = Example(name="", text=unit * (400_000 // len(unit)), tools=tools)
    began = process_time()
    content, _, calls = read(events_of(parser_of(hostile), [hostile.text]))
    assert process_time() - began < 5
    assert (content, calls) == (hostile.text, [])


def test_a_long_run_of_spaces_costs_little_and_is_kept_if_text_follows() -> None:
    spaces = [" " * 16] * 100_000
    example = Example(name="", text="", tools="hermes")
    began = process_time()
    content, _, _ = read(events_of(parser_of(example), ["a", *spaces, "b"]))
    assert process_time() - began < 5
    assert content == "a" + "".join(spaces) + "b"


def test_a_model_without_formats_needs_no_parser() -> None:
    assert (
        output_parser(tools=None, reasoning=None, schemas={}, opened=None, calls_max=None) is None
    )
