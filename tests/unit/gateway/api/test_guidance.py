"""What an answer follows is checked before a rank sees it: its parts, and the whole of them, as
ranks compile it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.api.answer_plan import AnswerPlan
from gateway.api.bodies import ChatBody
from gateway.api.grammar_reader import GrammarReader
from gateway.api.guidance import answer_grammar
from gateway.api.guided import DemandedForm, GrammarLimits
from gateway.api.tools import ToolMode, ToolRequest
from gateway.parsers.formats import REASONING_FORMATS, TOOL_FORMATS, OutputFormats
from gateway.served_model import ParserNames, ServedModel, load_served_model
from gateway.tokenizer_loader import TokenizerOptions
from shared.errors import RequestError
from shared.grammars.compiler import GrammarCompiler
from shared.grammars.messages import GrammarBudget, GrammarKind
from shared.grammars.sources import grammar_of
from shared.records import InstanceSpec
from tests.support.fake_clock import FakeClock
from tests.support.tiny_tokenizer import write_tokenizer

FORM = DemandedForm(param="guided_json", kind=GrammarKind.JSON_SCHEMA, text='{"type": "object"}')
OWN = grammar_of(FORM.kind, FORM.text)
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"n": {"enum": ["a ::= b"]}}}
SMALL = GrammarLimits(bytes_max=2_000, properties_max=50)


class RecordingReader(GrammarReader):
    """Compiles at once, and keeps what it was asked."""

    def __init__(self, compiler: GrammarCompiler, limits: GrammarLimits = SMALL) -> None:
        super().__init__(limits, GrammarBudget())
        self.compiler = compiler
        self.asked: list[tuple[str, str]] = []

    async def check(self, form: DemandedForm, served: ServedModel) -> str:
        grammar = grammar_of(form.kind, form.text, json_space=form.json_space)
        self.compiler.try_out(grammar)
        self.asked.append((form.param, grammar))
        return grammar


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tokenizer(path)
    return path


@pytest.fixture
def reader(folder: Path) -> RecordingReader:
    return RecordingReader(GrammarCompiler(folder / "tokenizer.json"))


async def served(folder: Path) -> ServedModel:
    spec = InstanceSpec(
        model_name="m",
        model_path=str(folder),
        num_moe_layers=1,
        num_experts=1,
        num_ranks=1,
        slots_per_rank=1,
        redundant_experts=0,
        context_tokens_max=64,
        vocab_size=1000,
    )
    return await load_served_model(
        spec,
        folder=None,
        name="",
        clock=FakeClock(),
        tokenizer_options=TokenizerOptions(),
        parsers=ParserNames(),
    )


def plan(
    mode: ToolMode, *, demands_form: bool = False, reasoning: str | None = None, **schema: Any
) -> AnswerPlan:
    schemas = {"f": {**SCHEMA, **schema}}
    return AnswerPlan(
        formats=OutputFormats(
            tools=TOOL_FORMATS["hermes"],
            reasoning=None if reasoning is None else REASONING_FORMATS[reasoning],
        ),
        tools=ToolRequest(mode=mode, tools=({},), schemas=schemas, calls_max=1),
        opened=None,
        demands_form=demands_form,
    )


@pytest.mark.parametrize("reasoning", [None, "qwen3"])
async def test_calls_are_checked_alone_and_with_what_comes_before_them(
    folder: Path, reader: RecordingReader, reasoning: str | None
) -> None:
    forced = plan(ToolMode.REQUIRED, reasoning=reasoning)
    body = ChatBody(messages=[])
    grammar = await answer_grammar(body, None, forced, await served(folder), reader)
    assert [param for param, _ in reader.asked] == ["tools", "tools"]
    assert reader.asked[-1][1] == grammar


async def test_arguments_of_calls_have_the_white_space_that_the_request_says(
    folder: Path, reader: RecordingReader
) -> None:
    forced, served_model = plan(ToolMode.REQUIRED), await served(folder)
    spaces = {}
    for pattern in (None, "[ ]{0,7}", ""):
        body = ChatBody(messages=[], guided_whitespace_pattern=pattern)
        spaces[pattern] = await answer_grammar(body, None, forced, served_model, reader)
    assert "[ ]{0,7}" in spaces["[ ]{0,7}"]
    assert '"whitespace_flexible": false' in spaces[""]
    assert len(set(spaces.values())) == 3


async def test_a_form_after_reasoning_is_checked_as_a_whole_for_the_field_that_demands_it(
    folder: Path, reader: RecordingReader
) -> None:
    free = plan(ToolMode.NONE, demands_form=True, reasoning="qwen3")
    grammar = await answer_grammar(ChatBody(messages=[]), FORM, free, await served(folder), reader)
    assert reader.asked == [("guided_json", OWN), ("guided_json", grammar)]
    assert grammar != OWN


async def test_a_form_beside_calls_is_checked_with_them(
    folder: Path, reader: RecordingReader
) -> None:
    both = plan(ToolMode.AUTO, demands_form=True)
    grammar = await answer_grammar(ChatBody(messages=[]), FORM, both, await served(folder), reader)
    assert reader.asked[-1] == ("tools", grammar)


@pytest.mark.parametrize("demands_form", [False, True])
async def test_what_is_checked_already_is_not_checked_again(
    folder: Path, reader: RecordingReader, demands_form: bool
) -> None:
    alone = plan(ToolMode.NONE, demands_form=demands_form)
    form, own = (FORM, OWN) if demands_form else (None, "")
    body = ChatBody(messages=[])
    assert await answer_grammar(body, form, alone, await served(folder), reader) == own
    assert reader.asked == ([("guided_json", OWN)] if demands_form else [])


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"p{n}": True for n in range(51)}},
        {"properties": {"a": {"enum": ["x" * 2_000]}}},
    ],
    ids=["properties", "bytes"],
)
async def test_schemas_that_are_too_large_are_refused_before_anybody_reads_them(
    folder: Path, reader: RecordingReader, schema: dict[str, Any]
) -> None:
    forced = plan(ToolMode.REQUIRED, **schema)
    with pytest.raises(RequestError) as error:
        await answer_grammar(ChatBody(messages=[]), None, forced, await served(folder), reader)
    assert error.value.param == "tools"
    assert reader.asked == []
    called_freely = plan(ToolMode.AUTO, **schema)
    body = ChatBody(messages=[])
    assert await answer_grammar(body, None, called_freely, await served(folder), reader) == ""


async def test_schemas_that_cannot_be_followed_are_refused_by_name(
    folder: Path, reader: RecordingReader
) -> None:
    any_of = [{"$ref": f"#/$defs/{n}"} for n in range(60)]
    defs = {str(n): {"properties": {}, "anyOf": any_of} for n in range(60)}
    forced = plan(ToolMode.REQUIRED, anyOf=any_of, **{"$defs": defs})
    large = RecordingReader(reader.compiler, GrammarLimits(bytes_max=200_000, properties_max=50))
    with pytest.raises(RequestError) as error:
        await answer_grammar(ChatBody(messages=[]), None, forced, await served(folder), large)
    assert (error.value.param, error.value.code) == ("tools", "invalid_grammar")
