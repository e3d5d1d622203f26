"""Every field of OpenAI's, vLLM's and SGLang's bodies for /v1/chat/completions and /v1/completions,
and what becomes of it. The bodies hold those that are served; the reference page is made of this
table."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Support(Enum):
    SERVED = "served"
    HARMLESS = "harmless"  # accepted, because it changes nothing in the answer
    REFUSED = "refused"  # a 400, unless its value asks for nothing


class Origin(Enum):
    """Whose API has the field."""

    OPENAI = "OpenAI"
    VLLM = "vLLM"
    SGLANG = "SGLang"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestField:
    """`neutral`: values, besides null, with which a refused field asks for nothing. `note` says why
    it is harmless, or what to do instead of a refused one."""

    name: str
    support: Support
    origins: tuple[Origin, ...]
    neutral: tuple[Any, ...] = field(default=())
    note: str = ""


_ORIGINS = {"o": Origin.OPENAI, "v": Origin.VLLM, "s": Origin.SGLANG}


def _fields(support: Support, *rows: tuple[Any, ...]) -> list[RequestField]:
    """Rows of (name, origins as letters, note, neutral values …)."""
    return [
        RequestField(
            name=name,
            support=support,
            origins=tuple(_ORIGINS[letter] for letter in origins),
            neutral=tuple(neutral),
            note=note,
        )
        for name, origins, note, *neutral in rows
    ]


_ROUTING = "ranks are chosen by the gateway"
_TRANSFER = "the engine moves KV itself"
_NO_IMAGES = "only text is served"
_ECHO_BACK = "an identifier for the server's own books"

_COMMON = [
    *_fields(
        Support.SERVED,
        ("model", "ovs", "the served name, or none"),
        ("stream", "ovs", ""),
        ("stream_options", "ovs", "include_usage, continuous_usage_stats"),
        ("max_tokens", "ovs", ""),
        ("min_tokens", "vs", ""),
        ("temperature", "ovs", ""),
        ("top_p", "ovs", ""),
        ("top_k", "vs", ""),
        ("min_p", "vs", ""),
        ("seed", "ovs", ""),
        ("stop", "ovs", ""),
        ("stop_token_ids", "vs", ""),
        ("ignore_eos", "vs", ""),
        ("n", "ovs", ""),
        ("best_of", "os", "must equal n"),
        ("presence_penalty", "ovs", ""),
        ("frequency_penalty", "ovs", ""),
        ("repetition_penalty", "vs", ""),
        ("logit_bias", "ovs", ""),
        ("logprobs", "ovs", ""),
        ("prompt_logprobs", "v", "in whole answers"),
        ("bad_words", "v", "texts that are not written"),
        ("allowed_token_ids", "v", "no other token is drawn; not with a guided answer"),
        ("truncate_prompt_tokens", "v", "keeps so many tokens of the prompt; -1: what fits"),
        ("priority", "vs", "as far as the API key allows; lower is sooner"),
        ("timeout", "", "seconds after which nobody wants the answer any more"),
        ("cache_salt", "vs", "who has the same salt shares cached prefixes"),
        ("truncation_side", "v", "left (default) keeps the last tokens, right the first"),
        ("include_stop_str_in_output", "v", ""),
        ("skip_special_tokens", "vs", ""),
        ("return_token_ids", "vs", ""),
        ("response_format", "ovs", ""),
        ("structured_outputs", "v", ""),
        ("guided_json", "v", "older name of structured_outputs.json"),
        ("guided_regex", "v", "older name of structured_outputs.regex"),
        ("guided_choice", "v", "older name of structured_outputs.choice"),
        ("guided_grammar", "v", "older name of structured_outputs.grammar"),
        (
            "guided_whitespace_pattern",
            "v",
            "older name of structured_outputs.whitespace_pattern: what may stand between the "
            "tokens of guided JSON",
        ),
    ),
    *_fields(
        Support.HARMLESS,
        ("user", "ovs", _ECHO_BACK),
        ("metadata", "o", _ECHO_BACK),
        ("request_id", "v", _ECHO_BACK),
        ("rid", "s", _ECHO_BACK),
        ("session_id", "vs", _ECHO_BACK),
        ("custom_labels", "s", "labels of SGLang's metrics"),
        ("store", "o", "nothing is stored"),
        ("service_tier", "o", "there is one tier"),
        ("safety_identifier", "o", _ECHO_BACK),
        ("prompt_cache_key", "o", "prefixes are cached and found without it"),
        ("prompt_cache_retention", "o", "prefixes are cached as long as there is room"),
        ("prompt_cache_options", "o", "prefixes are cached without it"),
        ("spaces_between_special_tokens", "v", "texts are decoded byte by byte"),
        ("stream_interval", "v", "a step's tokens are sent at once"),
        ("length_penalty", "v", "it is for beam search"),
        ("guided_decoding_backend", "v", "there is one"),
        ("media_io_kwargs", "v", _NO_IMAGES),
        ("mm_processor_kwargs", "vs", _NO_IMAGES),
        ("return_mm_kwargs", "v", _NO_IMAGES),
        ("mm_payload", "v", _NO_IMAGES),
        ("images_config", "s", _NO_IMAGES),
        ("return_token_offsets", "v", "it is for vLLM's render endpoints"),
        ("routed_experts_prompt_start", "v", "it goes with a field that is refused"),
        ("routed_experts_start_len", "s", "it goes with a field that is refused"),
        ("ngram_corpus_id", "s", "speculation changes no answer"),
        ("extra_key", "s", "a class of requests for SGLang's cache"),
    ),
    *_fields(
        Support.REFUSED,
        ("use_beam_search", "v", "", False),
        ("watermarking", "v", "", False),
        ("watermark", "s", ""),
        ("return_weight_versions", "v", "see system_fingerprint", False),
        ("return_spec_tokens_details", "s", "", False),
        ("repetition_detection", "v", ""),
        ("logprob_token_ids", "v", "ask for the likeliest by top_logprobs"),
        ("return_tokens_as_token_ids", "v", "use return_token_ids", False),
        ("kv_transfer_params", "v", _TRANSFER),
        ("ec_transfer_params", "v", _TRANSFER),
        ("vllm_xargs", "v", "", {}),
        ("custom_params", "s", ""),
        ("custom_logit_processor", "s", ""),
        ("lora_path", "s", "adapters are not served"),
        ("session_params", "s", "send the whole conversation"),
        ("return_hidden_states", "s", "", False),
        ("return_routed_experts", "s", "", False),
        ("return_cached_tokens_details", "s", "see usage.prompt_tokens_details", False),
        ("stop_regex", "s", "use stop", []),
        ("no_stop_trim", "s", "use include_stop_str_in_output", False),
        ("regex", "s", "use structured_outputs.regex"),
        ("ebnf", "s", "use structured_outputs.grammar"),
        ("bootstrap_host", "s", _ROUTING),
        ("bootstrap_port", "s", _ROUTING),
        ("bootstrap_room", "s", _ROUTING),
        ("routed_dp_rank", "s", _ROUTING),
        ("disagg_prefill_dp_rank", "s", _ROUTING),
        ("data_parallel_rank", "s", _ROUTING),
    ),
]

CHAT_FIELDS: dict[str, RequestField] = {
    each.name: each
    for each in [
        *_COMMON,
        *_fields(
            Support.SERVED,
            ("messages", "ovs", ""),
            ("max_completion_tokens", "ovs", "comes before max_tokens"),
            ("top_logprobs", "ovs", ""),
            ("tools", "ovs", "functions"),
            ("tool_choice", "ovs", "none, auto, required, a function by name, or allowed_tools"),
            ("parallel_tool_calls", "ovs", "false: one call at most"),
            ("reasoning_effort", "ovs", "for the chat template; refused if it reads none"),
            ("thinking", "s", "an object: type enabled, adaptive or disabled, for the template"),
            ("thinking_token_budget", "v", "ends the reasoning after so many tokens"),
            ("include_reasoning", "v", "false: the reasoning is left out"),
            ("separate_reasoning", "s", "false: the reasoning stays in the content"),
            ("chat_template_kwargs", "vs", "variables of the chat template"),
            ("documents", "v", "for the chat template"),
            ("add_generation_prompt", "v", ""),
            ("continue_final_message", "vs", ""),
        ),
        *_fields(
            Support.HARMLESS,
            ("prediction", "o", "it only makes OpenAI's answers come sooner"),
            ("max_dynamic_patch", "s", _NO_IMAGES),
            ("min_dynamic_patch", "s", _NO_IMAGES),
            ("use_audio_in_video", "s", _NO_IMAGES),
            ("video_config", "s", _NO_IMAGES),
            ("return_flat_raw_top_logprobs_b64", "s", "it goes with a field that is refused"),
        ),
        *_fields(
            Support.REFUSED,
            ("functions", "o", "pass tools", []),
            ("function_call", "o", "pass tool_choice", "none", "auto"),
            ("audio", "o", _NO_IMAGES),
            ("modalities", "o", _NO_IMAGES, ["text"]),
            ("moderation", "o", ""),
            ("verbosity", "o", "say it in a message", "medium"),
            ("web_search_options", "o", ""),
            (
                "chat_template",
                "v",
                "a request cannot bring one; whoever runs the gateway can replace the model's "
                "with --chat-template FILE",
            ),
            ("echo", "v", "use continue_final_message", False),
            ("add_special_tokens", "v", "the chat template writes them", False),
            ("return_prompt_text", "v", "", False),
            ("return_prompt_token_ids", "s", "use return_token_ids", False),
            ("return_meta_info", "s", "", False),
            ("return_input_ids_in_sglext", "s", "use return_token_ids", False),
            ("return_output_ids_in_sglext", "s", "use return_token_ids", False),
            ("return_sampling_mask", "s", "", False),
            ("return_flat_raw_output_top_logprobs", "s", "use top_logprobs", False),
            ("sampling_logprobs_mode", "s", ""),
            ("stream_reasoning", "s", "reasoning comes as it is written", True),
            ("reasoning", "s", "use reasoning_effort"),
            ("task", "s", ""),
            ("input_ids", "s", "use /v1/completions"),
        ),
    ]
}
COMPLETION_FIELDS: dict[str, RequestField] = {
    each.name: each
    for each in [
        *_COMMON,
        *_fields(
            Support.SERVED,
            ("prompt", "ovs", ""),
            ("echo", "ovs", ""),
        ),
        *_fields(
            Support.REFUSED,
            ("suffix", "ovs", "", ""),
            ("top_logprobs", "", "a field of chats; pass the number as logprobs"),
            ("prompt_embeds", "v", ""),
            ("add_special_tokens", "v", "send the prompt as token ids", True),
            ("json_schema", "s", "use response_format"),
            ("thinking_token_budget", "v", "chats have it", -1),
        ),
    ]
}
STREAM_OPTIONS: dict[str, RequestField] = {
    each.name: each
    for each in [
        *_fields(
            Support.SERVED,
            ("include_usage", "ovs", "the last chunk has the usage of all"),
            ("continuous_usage_stats", "vs", "with include_usage: every chunk has it"),
        ),
        *_fields(Support.HARMLESS, ("include_obfuscation", "o", "nothing is added")),
    ]
}
