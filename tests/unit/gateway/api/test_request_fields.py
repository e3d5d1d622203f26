"""The table of all fields against the bodies, against OpenAI's own types, and against the fields
that vLLM and SGLang read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from openai.types import completion_create_params
from openai.types.chat import chat_completion_stream_options_param
from openai.types.chat import completion_create_params as chat_create_params

from gateway.api.anthropic.bodies import MessagesBody
from gateway.api.anthropic.chat import chat_fields as chat_of_messages
from gateway.api.bodies import (
    AnswerFields,
    ChatBody,
    CompletionBody,
    DialectBody,
    GenerationBody,
    StreamOptions,
    decode_body,
    ignored_fields,
)
from gateway.api.dialect import naming_fields
from gateway.api.openai_responses.bodies import ResponsesBody
from gateway.api.openai_responses.chat import chat_fields as chat_of_response
from gateway.api.request_fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    STREAM_OPTIONS,
    Origin,
    RequestField,
    Support,
)
from gateway.api.token_routes import TokenizeBody
from shared.errors import RequestError

BODIES = [(ChatBody, CHAT_FIELDS), (CompletionBody, COMPLETION_FIELDS)]
LEAST: dict[type[GenerationBody], dict[str, Any]] = {
    ChatBody: {"messages": [{"role": "user", "content": "hi"}]},
    CompletionBody: {"prompt": "hi"},
}


def words(text: str) -> list[str]:
    return text.split()


# Fields of the request models of vLLM and SGLang, 2026-11.
VLLM_BOTH = words("""
model frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop
stream stream_options temperature top_p user use_beam_search top_k min_p repetition_penalty
watermarking length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens
skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side
prompt_logprobs logprob_token_ids allowed_token_ids bad_words add_special_tokens response_format
structured_outputs priority request_id session_id return_tokens_as_token_ids return_token_ids
routed_experts_prompt_start return_token_offsets return_mm_kwargs mm_payload cache_salt
kv_transfer_params return_weight_versions
ec_transfer_params vllm_xargs repetition_detection stream_interval thinking_token_budget""")
VLLM_CHAT = words("""
messages top_logprobs max_completion_tokens tools tool_choice reasoning_effort
include_reasoning parallel_tool_calls echo add_generation_prompt continue_final_message documents
chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs return_prompt_text""")
VLLM_COMPLETIONS = words("prompt echo suffix prompt_embeds")
SGLANG_BOTH = words("""
model frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop
stream stream_options temperature top_p user return_hidden_states return_routed_experts
routed_experts_start_len return_cached_tokens_details return_token_ids top_k min_p min_tokens regex
ebnf repetition_penalty stop_token_ids stop_regex no_stop_trim ignore_eos skip_special_tokens
lora_path session_id session_params response_format custom_params custom_logit_processor
images_config bootstrap_host bootstrap_port bootstrap_room routed_dp_rank disagg_prefill_dp_rank
data_parallel_rank rid extra_key cache_salt ngram_corpus_id priority watermark
return_spec_tokens_details""")
SGLANG_CHAT = words("""
messages top_logprobs max_completion_tokens tools tool_choice parallel_tool_calls
return_prompt_token_ids return_meta_info reasoning_effort reasoning task continue_final_message
separate_reasoning stream_reasoning chat_template_kwargs max_dynamic_patch min_dynamic_patch
use_audio_in_video input_ids thinking video_config mm_processor_kwargs return_input_ids_in_sglext
return_output_ids_in_sglext return_sampling_mask sampling_logprobs_mode
return_flat_raw_output_top_logprobs return_flat_raw_top_logprobs_b64""")
SGLANG_COMPLETIONS = words("prompt best_of echo suffix json_schema custom_labels")


def decode(cls: type[GenerationBody], **fields: Any) -> GenerationBody:
    return decode_body(json.dumps({**LEAST[cls], **fields}).encode(), cls)


@pytest.mark.parametrize(("cls", "table"), BODIES)
def test_the_bodies_hold_what_the_table_says_is_served(
    cls: type[GenerationBody], table: dict[str, RequestField]
) -> None:
    served = {name for name, about in table.items() if about.support is Support.SERVED}
    assert served == set(cls.__struct_fields__)


def test_stream_options_hold_what_is_served_of_them() -> None:
    served = {name for name, about in STREAM_OPTIONS.items() if about.support is Support.SERVED}
    assert served == set(StreamOptions.__struct_fields__)
    openai = chat_completion_stream_options_param.ChatCompletionStreamOptionsParam
    assert set(openai.__annotations__) <= set(STREAM_OPTIONS)


@pytest.mark.parametrize(
    ("table", "names", "origin"),
    [
        (
            CHAT_FIELDS,
            [*chat_create_params.CompletionCreateParamsBase.__annotations__, "stream"],
            Origin.OPENAI,
        ),
        (
            COMPLETION_FIELDS,
            [*completion_create_params.CompletionCreateParamsBase.__annotations__, "stream"],
            Origin.OPENAI,
        ),
        (CHAT_FIELDS, VLLM_BOTH + VLLM_CHAT, Origin.VLLM),
        (COMPLETION_FIELDS, VLLM_BOTH + VLLM_COMPLETIONS, Origin.VLLM),
        (CHAT_FIELDS, SGLANG_BOTH + SGLANG_CHAT, Origin.SGLANG),
        (COMPLETION_FIELDS, SGLANG_BOTH + SGLANG_COMPLETIONS, Origin.SGLANG),
    ],
)
def test_every_field_of_other_apis_is_in_the_table(
    table: dict[str, RequestField], names: list[str], origin: Origin
) -> None:
    assert set(names) <= set(table)
    assert [name for name in names if origin not in table[name].origins] == []


@pytest.mark.parametrize(
    ("cls", "about"),
    [
        (cls, about)
        for cls, table in BODIES
        for about in table.values()
        if about.support is Support.REFUSED
    ],
    ids=lambda each: getattr(each, "name", getattr(each, "__name__", "")),
)
def test_what_would_change_the_answer_is_refused_by_name(
    cls: type[GenerationBody], about: RequestField
) -> None:
    for plain in (None, *about.neutral):
        decode(cls, **{about.name: plain})
    for value in ("something else", 7, True, ["x"], {"a": 1}):
        if value in about.neutral:
            continue
        with pytest.raises(RequestError, match="not supported") as caught:
            decode(cls, **{about.name: value})
        assert caught.value.param == about.name


def test_zero_is_not_taken_for_false() -> None:
    with pytest.raises(RequestError):
        decode(ChatBody, use_beam_search=0)
    with pytest.raises(RequestError):
        decode(ChatBody, priority=False)


@pytest.mark.parametrize(("cls", "table"), BODIES)
def test_harmless_fields_are_accepted_and_not_named(
    cls: type[GenerationBody], table: dict[str, RequestField]
) -> None:
    harmless = [name for name, about in table.items() if about.support is Support.HARMLESS]
    raw = json.dumps({**LEAST[cls], **dict.fromkeys(harmless, "anything")}).encode()
    decode_body(raw, cls)
    assert ignored_fields(raw, cls) == []


def test_unknown_fields_are_named_fit_for_a_header() -> None:
    fields = {
        "temprature": 0,
        "X\r\nSet-Cookie: a=b": 1,
        "ß" * 100: None,
        "stream": True,
        "stream_options": {"include_usage": True, "usage": 1},
    }
    raw = json.dumps({**LEAST[ChatBody], **fields}).encode()
    decode_body(raw, ChatBody)
    assert ignored_fields(raw, ChatBody) == [
        "temprature",
        "X??Set-Cookie??a?b",
        "?" * 64,
        "stream_options.usage",
    ]


def test_many_unknown_fields_are_not_all_named() -> None:
    raw = json.dumps({**LEAST[ChatBody], **{f"x{n}": n for n in range(100)}}).encode()
    assert len(ignored_fields(raw, ChatBody)) == 32


@pytest.mark.parametrize(
    ("cls", "field"),
    [
        (TokenizeBody, b'"\xc1": 1'),
        (ChatBody, b'"a\xff": {}'),
        (ChatBody, b'"stream_options": {"\xed\xa0\x80": 1}'),
    ],
)
def test_a_name_that_is_no_text_is_refused(cls: type[msgspec.Struct], field: bytes) -> None:
    """The decoder skips what it does not know, and the error comes with the names."""
    raw = b'{"messages": [], "stream": true, ' + field + b"}"
    with pytest.raises(RequestError) as caught:
        ignored_fields(raw, type(decode_body(raw, cls)))
    assert caught.value.code == "invalid_json"


def test_every_refusal_and_every_harmless_field_has_its_reason() -> None:
    for _, table in BODIES:
        for about in table.values():
            assert about.note or about.support is not Support.HARMLESS, about.name


DIALECTS: list[tuple[type[DialectBody], dict[str, Any], Callable[[Any], dict[str, Any]]]] = [
    (
        MessagesBody,
        {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
        chat_of_messages,
    ),
    (ResponsesBody, {"input": "hi"}, lambda body: chat_of_response(body, [])),
]
ANSWER_FIELDS: dict[str, Any] = {
    "min_tokens": 2,
    "top_k": 3,
    "min_p": 0.5,
    "stop_token_ids": [4],
    "ignore_eos": True,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "repetition_penalty": 1.5,
    "logit_bias": {5: 1.5},
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "structured_outputs": {"regex": "a"},
    "guided_json": {"const": 1},
    "guided_regex": "a",
    "guided_choice": ["a"],
    "guided_grammar": 'start: "a"',
    "guided_whitespace_pattern": " ",
    "bad_words": ["a"],
    "allowed_token_ids": [6],
    "truncate_prompt_tokens": 7,
    "truncation_side": "left",
    "priority": 1,
    "timeout": 8.5,
    "cache_salt": "a",
}


@pytest.mark.parametrize(("cls", "least", "chat_of"), DIALECTS)
def test_what_means_the_same_in_every_api_is_served_in_every_api(
    cls: type[DialectBody], least: dict[str, Any], chat_of: Callable[[Any], dict[str, Any]]
) -> None:
    assert set(ANSWER_FIELDS) == set(AnswerFields.__struct_fields__)
    body = decode_body(json.dumps({**least, **ANSWER_FIELDS}).encode(), cls)
    chat = chat_of(body)
    assert {name: chat[name] for name in ANSWER_FIELDS} == ANSWER_FIELDS
    msgspec.convert(chat, ChatBody)


@pytest.mark.parametrize(("cls", "least", "chat_of"), DIALECTS)
def test_what_another_api_has_not_of_a_chat_is_refused_by_name(
    cls: type[DialectBody], least: dict[str, Any], chat_of: Callable[[Any], dict[str, Any]]
) -> None:
    for name, about in CHAT_FIELDS.items():
        raw = json.dumps({**least, name: ["something else"]}).encode()
        if name in cls.__struct_fields__:
            continue
        if about.support is Support.HARMLESS:
            decode_body(raw, cls)
            continue
        with pytest.raises(RequestError, match=f"^{name} is not supported here: ") as caught:
            decode_body(raw, cls)
        assert (caught.value.param, caught.value.code) == (name, "unsupported_field")
        for plain in (None, *about.neutral):
            decode_body(json.dumps({**least, name: plain}).encode(), cls)
    for name, plain in {"n": 1, "logprobs": False, "return_token_ids": False}.items():
        decode_body(json.dumps({**least, name: plain}).encode(), cls)


def test_a_refusal_says_what_to_use_in_place_of_the_field() -> None:
    raw = json.dumps({"input": "hi", "max_tokens": 7}).encode()
    with (
        pytest.raises(RequestError, match="here: use max_output_tokens") as caught,
        naming_fields({"max_tokens": "max_output_tokens"}),
    ):
        decode_body(raw, ResponsesBody)
    assert caught.value.param == "max_tokens"


def test_the_options_of_a_responses_stream_are_an_object() -> None:
    for value in ("x", 7, {"include_obfuscation": "x"}):
        with pytest.raises(RequestError) as caught:
            decode_body(
                json.dumps({"input": "hi", "stream_options": value}).encode(), ResponsesBody
            )
        assert caught.value.param == "stream_options"
