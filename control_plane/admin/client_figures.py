"""What `GET /v1/clients` answers: what clients get, as all gateways have counted it since their
starts. They are asked for their metrics, as Prometheus would ask."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from shared.errors import StoreUnavailable
from shared.keys import Keys
from shared.records import GatewayRecord, unpack_record
from shared.store import Store

_TIMEOUT_S = 1.0
_KNOWN_FOR_S = 5.0
_TOKENS = "vllm:generation_tokens_total"
_GAPS = "starfish_gateway_inter_token_seconds_bucket"

Gateways = Callable[[], Awaitable[list[GatewayRecord]]]


class ClientsAnswer(msgspec.Struct, kw_only=True):
    """`tokens` that clients have got, and `gaps` between two of a stream, of which `gap_counts[i]`
    were at most `gap_bounds_s[i]` long. Sums over the `answered` of `gateways`; they fall when a
    gateway begins anew. `problem` says why some did not answer."""

    gateways: int
    answered: int
    tokens: int
    gaps: int
    gap_bounds_s: list[float]
    gap_counts: list[int]
    problem: str


class ClientFigures:
    """Call `close` at the end."""

    def __init__(self, gateways: Gateways) -> None:
        self._gateways = gateways
        self._http: aiohttp.ClientSession | None = None

    async def read(self) -> ClientsAnswer:
        """Asks all at once; one that does not answer is left out."""
        if self._http is None:
            timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
            self._http = aiohttp.ClientSession(timeout=timeout, trust_env=False)
        records = await self._gateways()
        asked = await asyncio.gather(*(_ask(self._http, each) for each in records))
        texts = [text for text, _ in asked if text is not None]
        problems = [problem for _, problem in asked if problem]
        # Parsing takes milliseconds, which a death must not wait for.
        return await asyncio.to_thread(_sum, len(records), texts, problems)

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()


def gateways_of(store: Store, keys: Keys, now: Callable[[], float]) -> Gateways:
    """Those in etcd; for some seconds, and while etcd is away, those found last."""
    known: list[GatewayRecord] = []
    looked_at = -_KNOWN_FOR_S

    async def read() -> list[GatewayRecord]:
        nonlocal known, looked_at
        if now() - looked_at >= _KNOWN_FOR_S:
            looked_at = now()
            try:
                found = (await store.get_prefix(keys.gateways)).values
            except StoreUnavailable:
                return known
            known = [unpack_record(value.value, GatewayRecord) for value in found]
        return known

    return read


async def _ask(http: aiohttp.ClientSession, record: GatewayRecord) -> tuple[str | None, str]:
    """The lines that count, or what is wrong."""
    try:
        async with http.get(f"{record.own_url}/metrics", allow_redirects=False) as answer:
            if answer.status != 200:
                return None, f"{record.gateway} answers /metrics with HTTP {answer.status}"
            text = await answer.text(errors="replace")
    except (aiohttp.ClientError, TimeoutError) as error:
        return None, f"{record.gateway} does not answer ({type(error).__name__})"
    wanted = [line for line in text.splitlines() if line.startswith((_TOKENS, _GAPS))]
    return "\n".join([*wanted, ""]), ""


def _sum(gateways: int, texts: Iterable[str], problems: list[str]) -> ClientsAnswer:
    tokens, answered = 0.0, 0
    counts: Counter[float] = Counter()
    for text in texts:
        answered += 1
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == _GAPS:
                    counts[float(sample.labels["le"])] += int(sample.value)
                else:
                    tokens += sample.value
    bounds = sorted(bound for bound in counts if bound != float("inf"))
    return ClientsAnswer(
        gateways=gateways,
        answered=answered,
        tokens=int(tokens),
        gaps=counts[float("inf")],
        gap_bounds_s=bounds,
        gap_counts=[counts[bound] for bound in bounds],
        problem="; ".join(problems),
    )
