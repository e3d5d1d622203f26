"""Computes the results of `benchmarks.gpu_server` from the arrivals that clients saw, and the bytes
that a card reads for one step. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu_serve_load import Arrival
from cli.bench.stats import Spread
from cli.bench.stream_client import StreamRecord
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes

_VALUE_BYTES = 2

Stream = Sequence[Arrival]


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyWindow:
    """The time in which all streams decode. `emitted` is the mean number of tokens that a stream
    had emitted in the middle of it."""

    seconds: float
    num_tokens: int
    emitted: float


def steady_window(streams: Sequence[Stream]) -> SteadyWindow | None:
    """From the moment when the last stream has its first token to the moment when the first stream
    ends. None if the second is not later than the first."""
    if not streams or not all(streams):
        return None
    begin = max(stream[0].at for stream in streams)
    end = min(stream[-1].at for stream in streams)
    if end <= begin:
        return None
    before = sum(a.num_tokens for stream in streams for a in stream if a.at <= begin)
    until = sum(a.num_tokens for stream in streams for a in stream if a.at <= end)
    return SteadyWindow(
        seconds=end - begin,
        num_tokens=until - before,
        emitted=(before + until) / 2 / len(streams),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CardSharing:
    """This many ranks, assigned in turn to this many cards."""

    ranks: int
    cards: int

    @property
    def of_a_card(self) -> int:
        """The number of ranks on the card that has most of them."""
        return -(-self.ranks // min(self.cards, self.ranks))


def distinct_experts(num_experts: int, top_k: int, num_tokens: int) -> float:
    """The expected number in one layer, if every token chooses uniformly at random."""
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** num_tokens)


def step_bytes(sizes: DecoderSizes, shared: CardSharing, *, batch: int, context: float) -> float:
    """Bytes that the card with most ranks reads for one step, if each rank has `batch` sequences of
    `context` tokens: attention, routers and head once for each of its ranks, their KV, and the
    card's share of the experts that the tokens of all ranks chose, each once."""
    of_a_card = shared.of_a_card
    chosen = distinct_experts(sizes.num_experts, sizes.top_k, batch * shared.ranks)
    experts = chosen * sizes.num_moe_layers * sizes.num_expert_weights * of_a_card / shared.ranks
    own = sizes.num_shared_weights + batch * context * sizes.kv_values_per_token
    return _VALUE_BYTES * (experts + of_a_card * own)


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The least time of a step by its bytes alone, and the share of the roofline."""

    gigabytes: float
    step_ms: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRow:
    """All rounds of one batch. `tokens_per_s` and the values derived from it are of the steady
    windows; None if a stream failed or there was no such window."""

    ranks: int
    cards: int
    batch: int  # of each rank
    rounds: int
    errors: tuple[str, ...]
    ttft_ms: Spread
    itl_ms: Spread
    steady_s: float
    tokens_per_s: float | None
    step_ms: float | None
    context: float | None
    floor: Floor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    records: Sequence[StreamRecord]
    streams: Sequence[Stream]


def server_row(
    rounds: Sequence[Round],
    shared: CardSharing,
    *,
    batch: int,
    prompt_tokens: int,
    sizes: DecoderSizes | None,
    copy_tb_per_s: float | None,
) -> ServerRow:
    """Without sizes or a copy rate there is no floor."""
    records = [record for each in rounds for record in each.records]
    errors = tuple(record.error for record in records if record.error is not None)
    good = [record for record in records if record.error is None]
    windows = (
        [] if errors else [w for each in rounds if (w := steady_window(each.streams)) is not None]
    )
    seconds = sum(window.seconds for window in windows)
    rate = step_ms = context = floor = None
    if windows:
        rate = sum(window.num_tokens for window in windows) / seconds
        step_ms = batch * shared.ranks / rate * 1000
        context = prompt_tokens + sum(window.emitted for window in windows) / len(windows)
        if sizes is not None and copy_tb_per_s is not None:
            gigabytes = step_bytes(sizes, shared, batch=batch, context=context) / 1e9
            floor_ms = gigabytes / copy_tb_per_s
            floor = Floor(gigabytes=gigabytes, step_ms=floor_ms, share=floor_ms / step_ms)
    return ServerRow(
        ranks=shared.ranks,
        cards=shared.cards,
        batch=batch,
        rounds=len(rounds),
        errors=errors,
        ttft_ms=Spread.of([record.ttft_ms for record in good]),
        itl_ms=Spread.of([gap for record in good for gap in record.gaps_ms()]),
        steady_s=seconds,
        tokens_per_s=rate,
        step_ms=step_ms,
        context=context,
        floor=floor,
    )


_HEADER = (
    "ranks  batch  streams  tokens/s  step ms   TTFT p50     p99 ms   ITL p50     p99 ms"
    "  GB a step  floor ms   share"
)


def table(rows: Sequence[ServerRow]) -> str:
    return "\n".join([_HEADER, *map(format_row, rows)])


def format_row(row: ServerRow) -> str:
    """One line of the table."""
    floor = row.floor
    rate = f"{'-':>8}  {'-':>7}"
    if row.tokens_per_s is not None:
        rate = f"{row.tokens_per_s:8.0f}  {row.step_ms:7.2f}"
    least = f"{'-':>9}  {'-':>8}  {'-':>6}"
    if floor is not None:
        least = f"{floor.gigabytes:9.2f}  {floor.step_ms:8.2f}  {floor.share:6.1%}"
    failed = f"  {len(row.errors)} failed: {row.errors[0]}" if row.errors else ""
    return (
        f"{row.ranks:5}  {row.batch:5}  {row.batch * row.ranks:7}  {rate}  "
        f"{row.ttft_ms.p50:9.1f}  {row.ttft_ms.p99:9.1f}  {row.itl_ms.p50:8.2f}  "
        f"{row.itl_ms.p99:9.2f}  {least}{failed}"
    )
