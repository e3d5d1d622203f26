"""The body of SGLang's `/generate`, and the completion that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.api.bodies import CompletionBody
from shared.errors import RequestError

NEW_TOKENS_DEFAULT = 128


class GenerateParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`sampling_params`. A misspelt one is refused: SGLang does so, too."""

    max_new_tokens: int | None = NEW_TOKENS_DEFAULT
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    sampling_seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    json_schema: Any = None
    regex: str | None = None
    ebnf: str | None = None
    stream_interval: int | None = None
    stop_regex: Any = None
    structural_tag: Any = None
    custom_params: Any = None


class GenerateBody(msgspec.Struct, kw_only=True):
    """Either `text` or `input_ids`, of one prompt or of several."""

    model: str | None = None
    text: str | list[str] | None = None
    input_ids: list[Any] | None = None
    sampling_params: GenerateParams | None = None
    stream: bool | None = None
    rid: Any = None
    priority: int | None = None
    cache_salt: str | None = None
    return_logprob: Any = None
    return_hidden_states: Any = None
    input_embeds: Any = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    lora_path: Any = None
    session_params: Any = None
    custom_logit_processor: Any = None

    @property
    def is_batch(self) -> bool:
        """Whether the answer is a list."""
        ids = self.input_ids
        several = isinstance(self.text, list) or bool(ids and isinstance(ids[0], list))
        return several or (self.sampling_params or GenerateParams()).n not in (None, 1)


_REFUSED = {
    "return_logprob": "use /v1/completions with logprobs",
    "return_hidden_states": "leave it out",
    "input_embeds": "pass text or input_ids",
    "image_data": "only text is served",
    "video_data": "only text is served",
    "audio_data": "only text is served",
    "lora_path": "adapters are not served",
    "session_params": "send the whole prompt",
    "custom_logit_processor": "leave it out",
}
_REFUSED_PARAMS = {
    "stop_regex": "use stop",
    "structural_tag": "use json_schema, regex or ebnf",
    "custom_params": "leave it out",
}


def completion_of(body: GenerateBody) -> CompletionBody:
    """Raises RequestError."""
    params = body.sampling_params or GenerateParams()
    _refuse(body, _REFUSED)
    _refuse(params, _REFUSED_PARAMS)
    if (body.text is None) == (body.input_ids is None):
        raise RequestError("pass either text or input_ids", param="text")
    prompt = body.text if body.text is not None else body.input_ids
    assert prompt is not None, "one of them is there"
    return CompletionBody(
        prompt=prompt,
        model=body.model,
        stream=body.stream,
        priority=body.priority,
        cache_salt=body.cache_salt,
        max_tokens=params.max_new_tokens,
        min_tokens=params.min_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.sampling_seed,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias,
        n=params.n,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        include_stop_str_in_output=params.no_stop_trim,
        ignore_eos=params.ignore_eos,
        skip_special_tokens=params.skip_special_tokens,
        guided_json=params.json_schema,
        guided_regex=params.regex,
        guided_grammar=params.ebnf,
    )


def _refuse(fields: msgspec.Struct, refused: Mapping[str, str]) -> None:
    """A field of `refused` may have a value that asks for nothing."""
    for name, advice in refused.items():
        if getattr(fields, name) not in (None, False, "", [], {}):
            raise RequestError(f"{name} is not supported: {advice}", param=name)
