"""A CUDA rank's place on the data network, as membership sees it: which peers it has met. What goes
over it is `ep_exchange`'s."""

from __future__ import annotations

from gpu_worker.config import ExchangeKind
from gpu_worker.cuda.ep.exchange import EpExchange
from shared.records import ExchangeHandles, RankRecord
from shared.types import Member
from shared.wire import RegionOpened


class EpEndpoint:
    """Implements `link_keeper.DataEndpoint`. A pair of incarnations meets once; a buffer stays
    mapped until the next incarnation of its rank is adopted."""

    def __init__(self, member: Member, exchange: EpExchange, kind: ExchangeKind) -> None:
        self.name = f"ep-{member}"
        self._exchange = exchange
        self._kind = kind

    def next_generation(self, target: Member) -> int:
        return 0

    def open_region(self, source: Member, generation: int) -> tuple[int, int]:
        """Peers write into the one buffer, whose handles stand in this rank's record."""
        return 0, 0

    def connect(self, region: RegionOpened, peer: RankRecord) -> None:
        """Raises ValueError where the peer's exchange is of another kind or layout, ConnectionError
        where its former life has not left the adopted map yet."""
        handles = handles_of(peer, self._kind, self._exchange.step_tokens_max)
        if not self._exchange.is_connected(peer.member):
            self._exchange.connect(peer.member, handles)

    def is_open(self, target: Member) -> bool:
        return self._exchange.is_connected(target)

    def forget(self, member: Member) -> None:
        """Nothing yet: the engine may still run a map that names it."""


def handles_of(peer: RankRecord, kind: ExchangeKind, step_tokens_max: int) -> ExchangeHandles:
    """Raises ValueError where its exchange is not of this kind, or laid out for other steps."""
    handles = peer.exchange_handles
    if handles is None or peer.exchange != kind.value:
        raise ValueError(
            f"rank {peer.member} has the exchange {peer.exchange!r}, and this one {kind.value!r}: "
            "start all ranks of an instance with the same --device and --ep-dispatch"
        )
    if handles.step_tokens_max != step_tokens_max:
        raise ValueError(
            f"rank {peer.member} runs steps of {handles.step_tokens_max} tokens at most, and this "
            f"one of {step_tokens_max}: start all ranks of an instance with the same "
            "--step-tokens-max"
        )
    return handles


class SingleRankEndpoint:
    """Implements `link_keeper.DataEndpoint` for an instance of one rank."""

    def __init__(self, member: Member) -> None:
        self.name = f"solo-{member}"

    def next_generation(self, target: Member) -> int:
        return 0

    def open_region(self, source: Member, generation: int) -> tuple[int, int]:
        return 0, 0

    def connect(self, region: RegionOpened, peer: RankRecord) -> None:
        raise ConnectionError("this rank was started for an instance of one rank")

    def is_open(self, target: Member) -> bool:
        return False

    def forget(self, member: Member) -> None: ...
