"""How many tokens a rank runs in one step if its configuration leaves that to the device."""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.config import RankConfig

_TOKENS_MAX = 192
_PREFILL_CHUNK_TOKENS = 128
_TOKENS_MAX_OF_LONE_CARD = 4096
"""A card is as fast as it can be from some 2,000 tokens on. With peers, the exchange's buffers grow
with the steps of all, so that steps stay small there."""
_MIXED_PREFILL_TOKENS_OF_LONE_CARD = 512
"""With Qwen3-30B's shape on an H200, such a step takes 1.2 times as long as 32 decodes alone."""

_TENANT_TOKENS_OF_CPU = 4
"""A step of a CPU rank that decodes two takes twice as long with eight tokens more; one of a card
does not."""

_TENANT_HOST_ROWS_OF_CARD = 4
"""The host takes some milliseconds to draw one token from a large vocabulary, and a step of a card
some tens."""


def with_step_sizes(config: RankConfig, *, on_card: bool, num_ranks: int) -> RankConfig:
    """The configuration with the sizes of a step; that of prefill beside decodes stays 0 where it
    has no limit. Raises ConfigError if they contradict each
    other."""
    is_lone_card = on_card and num_ranks == 1
    tokens_max = config.step_tokens_max or (
        max(_TOKENS_MAX_OF_LONE_CARD, config.prefill_chunk_tokens) if is_lone_card else _TOKENS_MAX
    )
    chunk = _TOKENS_MAX_OF_LONE_CARD if is_lone_card else _PREFILL_CHUNK_TOKENS
    mixed = _MIXED_PREFILL_TOKENS_OF_LONE_CARD if is_lone_card else 0
    sized = replace(
        config,
        step_tokens_max=tokens_max,
        prefill_chunk_tokens=config.prefill_chunk_tokens or min(chunk, tokens_max),
        mixed_prefill_tokens=config.mixed_prefill_tokens or mixed,
        tenant_host_rows=config.tenant_host_rows or (_TENANT_HOST_ROWS_OF_CARD if on_card else -1),
        tenant_step_tokens=config.tenant_step_tokens or (-1 if on_card else _TENANT_TOKENS_OF_CPU),
    )
    sized.check()
    return sized
