"""How many tokens a rank runs in one step if its configuration leaves that to the device."""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.config import RankConfig

TOKENS_MAX = 192
_PREFILL_CHUNK_TOKENS = 128
_TOKENS_MAX_OF_LONE_CARD = 4096
"""A card is as fast as it can be from some 2,000 tokens on."""
_TOKENS_MAX_WITH_PEERS = (512, 256)
"""Of cards. The exchange's buffers grow with the steps of all ranks."""
_EXCHANGE_BYTES_PER_VALUE = 12
"""Of a value that may arrive: bf16, in the buffers of Mooncake's dispatch and combine, and ours."""
_EXCHANGE_SHARE_MAX = 0.08
"""Of a card's memory."""
_MIXED_PREFILL_TOKENS_WITH_PEERS = 128
_MIXED_PREFILL_TOKENS_OF_LONE_CARD = 512
"""With Qwen3-30B's shape on an H200, such a step takes 1.2 times as long as 32 decodes alone."""

_TENANT_TOKENS_OF_CPU = 4
"""A step of a CPU rank that decodes two takes twice as long with eight tokens more; one of a card
does not."""

_TENANT_HOST_ROWS_OF_CARD = 4
"""The host takes some milliseconds to draw one token from a large vocabulary, and a step of a card
some tens."""
_TENANT_HOST_ROWS_OF_CPU = 64
"""The host draws all: what they cost, which is learned, is the limit."""


def tokens_max_of_exchange(
    hidden_size: int, num_slots: int, card_bytes: int, ranks_per_card: int
) -> int:
    """The most tokens in a step of cards that exchange: as many as leave the buffers a small part
    of each rank's memory. `num_slots` are those of the whole instance."""
    bytes_per_token = num_slots * hidden_size * _EXCHANGE_BYTES_PER_VALUE
    room = _EXCHANGE_SHARE_MAX * card_bytes / ranks_per_card
    fitting = (n for n in _TOKENS_MAX_WITH_PEERS if n * bytes_per_token <= room)
    return next(fitting, TOKENS_MAX)


def with_step_sizes(
    config: RankConfig, *, on_card: bool, num_ranks: int, tokens_max: int = TOKENS_MAX
) -> RankConfig:
    """The configuration with the sizes of a step; that of prefill beside decodes stays 0 where it
    has no limit. `num_ranks` are those that exchange with each other. `tokens_max` is the default
    of cards with peers. Raises ConfigError if sizes contradict each other."""
    default, chunk, mixed = TOKENS_MAX, _PREFILL_CHUNK_TOKENS, 0
    if on_card and num_ranks == 1:
        default = max(_TOKENS_MAX_OF_LONE_CARD, config.prefill_chunk_tokens)
        chunk, mixed = _TOKENS_MAX_OF_LONE_CARD, _MIXED_PREFILL_TOKENS_OF_LONE_CARD
    elif on_card and max(config.step_tokens_max, tokens_max) > TOKENS_MAX:
        default = tokens_max
        chunk, mixed = config.step_tokens_max or default, _MIXED_PREFILL_TOKENS_WITH_PEERS
    step_tokens_max = config.step_tokens_max or default
    sized = replace(
        config,
        step_tokens_max=step_tokens_max,
        prefill_chunk_tokens=config.prefill_chunk_tokens or min(chunk, step_tokens_max),
        mixed_prefill_tokens=config.mixed_prefill_tokens or mixed,
        tenant_host_rows=config.tenant_host_rows
        or (_TENANT_HOST_ROWS_OF_CARD if on_card else _TENANT_HOST_ROWS_OF_CPU),
        tenant_step_tokens=config.tenant_step_tokens or (-1 if on_card else _TENANT_TOKENS_OF_CPU),
    )
    sized.check()
    return sized
