"""How the text of a chat's choices is read, and which grammar makes it readable: decided from the
request, the model's formats and the end of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.api.answer_reader import AnswerReader, CallIds
from gateway.api.token_offsets import TokenOffsets
from gateway.api.tools import CALLS_MAX, ToolMode, ToolRequest
from gateway.detokenizer import TokenNames
from gateway.parsers.call_grammar import CallGrammar, TokenOf, around, joined
from gateway.parsers.formats import TOOL_FORMATS, OutputFormats, ToolFormat, output_parser
from gateway.parsers.output_parser import OutputParser
from shared.errors import RequestError
from shared.grammars.closed_schema import JSON_SPACE


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPlan:
    """`formats` are those of the model. `opened`: where the prompt leaves the reasoning, as
    `output_parser` has it. `demands_form`: the request demands a form of its own. The reasoning
    stays in the content unless `splits_reasoning`, and is left out unless `shows_reasoning`."""

    formats: OutputFormats
    tools: ToolRequest
    opened: bool | None
    demands_form: bool
    splits_reasoning: bool = True
    shows_reasoning: bool = True

    @property
    def call_format(self) -> ToolFormat | None:
        """In which format calls are written, if there may be any."""
        form = self.formats.tools
        if form is None or self.tools.mode is ToolMode.NONE:
            return None
        return TOOL_FORMATS[form.guided] if self.guides_calls else form

    @property
    def must_call(self) -> bool:
        return self.tools.mode is ToolMode.REQUIRED

    @property
    def guides_calls(self) -> bool:
        """Whether the calls that there may be follow a grammar."""
        return self.tools.mode is not ToolMode.NONE and (self.must_call or self.demands_form)

    @property
    def is_parsed(self) -> bool:
        """False: the whole text is content."""
        return self._parser() is not None

    def reader(
        self, names: TokenNames, prompt: tuple[int, ...], *, answer: str, choice: int
    ) -> AnswerReader | None:
        """For choice number `choice` of the answer with the id `answer`. None: the whole text is
        content."""
        if not self.is_parsed:
            return None
        return self.whole_reader(names, prompt, answer=answer, choice=choice)

    def whole_reader(
        self, names: TokenNames, prompt: tuple[int, ...], *, answer: str, choice: int
    ) -> AnswerReader:
        """As `reader`, also if the whole text is content."""
        parser = self._parser() or OutputParser(first=None, then=None, calls_max=None)
        return AnswerReader(
            parser,
            TokenOffsets(names.text, follows=prompt),
            CallIds(answer=answer, choice=choice, form=self.call_format),
            shows_reasoning=self.shows_reasoning,
        )

    def _parser(self) -> OutputParser | None:
        return output_parser(
            tools=self.call_format,
            reasoning=self.formats.reasoning if self.splits_reasoning else None,
            schemas=self.tools.schemas,
            opened=self.opened,
            calls_max=self.tools.calls_max,
            guided=self.must_call or self.demands_form,
        )

    def calls_grammar(self, token_of: TokenOf, *, json_space: str = JSON_SPACE) -> str:
        """The grammar of the calls alone; empty if they are not guided. `json_space` is the white
        space in their arguments, as a regular expression. Raises GrammarError."""
        if not self.guides_calls:
            return ""
        calls = self._calls(self._rules(token_of, json_space))
        return joined("calls", calls) if calls else ""

    def grammar(self, own: str, token_of: TokenOf, *, json_space: str = JSON_SPACE) -> str:
        """The grammar of the whole answer; empty if nothing guides it. `own` is that of the form
        that the request demands. It holds for what comes after the reasoning, and not for calls,
        in whose arguments there is `json_space`. Raises RequestError if calls leave no room for
        it."""
        rules, reasoning = self._rules(token_of, json_space), self.formats.reasoning
        before = rules.reasoning(reasoning, opened=self.opened)
        calls = self._calls(rules)
        if self.must_call:
            if self.demands_form:
                raise RequestError(
                    "tool_choice demands a call, and another field a form of the answer; pass only "
                    "one of them",
                    param="tool_choice",
                )
            return joined("reasoning calls", before, calls)
        if not own:
            return ""
        answer = f"{rules.answer(reasoning)} @answer"
        if calls:
            return around(joined(f"reasoning (calls | {answer})", before, calls), own)
        if reasoning is None or (self.opened is False and not reasoning.is_harmony):
            return own
        return around(joined(f"reasoning {answer}", before), own)

    def _calls(self, rules: CallGrammar) -> str:
        form = self.call_format
        if form is None:
            return ""
        calls_max = self.tools.calls_max or CALLS_MAX
        return rules.calls(form, self.tools.schemas, calls_max=calls_max)

    def _rules(self, token_of: TokenOf, json_space: str) -> CallGrammar:
        formats = OutputFormats(tools=self.call_format, reasoning=self.formats.reasoning)
        return CallGrammar(token_of, formats.markers(), json_space=json_space)
