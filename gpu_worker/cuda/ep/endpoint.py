"""A CUDA rank's place on the data network, as membership sees it: which peers it has met. What goes
over it is `exchange`'s to decide."""

from __future__ import annotations

from gpu_worker.config import ExchangeKind
from gpu_worker.cuda.ep.rank_mask import RankMask
from shared.records import ExchangeHandles, RankRecord
from shared.types import GivenRegion, Member
from shared.wire import RegionOpened


class EpEndpoint:
    """Implements `link_keeper.DataEndpoint`. Two incarnations meet once. A buffer stays mapped
    until the next incarnation of its rank is adopted."""

    def __init__(
        self, member: Member, mask: RankMask, kind: ExchangeKind, *, step_tokens_max: int
    ) -> None:
        """`step_tokens_max` is what this rank's buffer is laid out for."""
        self.name = f"ep-{member}"
        self._mask = mask
        self._kind = kind
        self._step_tokens_max = step_tokens_max

    def next_generation(self, target: Member) -> int:
        return 0

    def open_region(self, source: Member, generation: int) -> GivenRegion:
        """Peers write into the one buffer, whose handles stand in this rank's record."""
        return GivenRegion(0, 0)

    def connect(self, region: RegionOpened, peer: RankRecord) -> None:
        """Raises ValueError if the peer's exchange is of another kind or layout, ConnectionError if
        the adopted map still names its former incarnation."""
        handles = handles_of(peer, self._kind, self._step_tokens_max)
        if not self._mask.is_connected(peer.member):
            self._mask.connect(peer.member, handles)

    @property
    def memory_links(self) -> tuple[Member, ...]:
        return ()

    def is_open(self, target: Member) -> bool:
        return self._mask.is_connected(target)

    def forget(self, member: Member) -> None:
        """Nothing yet: the engine may still run a map that names it."""

    def sweep(self) -> None:
        """Nothing: a buffer is unmapped when the next incarnation of its rank is adopted."""


def handles_of(peer: RankRecord, kind: ExchangeKind, step_tokens_max: int) -> ExchangeHandles:
    """Raises ValueError if its exchange is not of this kind, or is laid out for other steps."""
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


class NoExchangeEndpoint:
    """Implements `link_keeper.DataEndpoint` for ranks that exchange nothing: of a dense model, or
    in an instance of one rank."""

    def __init__(self, member: Member, *, has_peers: bool) -> None:
        self.name = f"alone-{member}"
        self._has_peers = has_peers
        self._met: set[Member] = set()

    def next_generation(self, target: Member) -> int:
        return 0

    def open_region(self, source: Member, generation: int) -> GivenRegion:
        return GivenRegion(0, 0)

    def connect(self, region: RegionOpened, peer: RankRecord) -> None:
        """Raises ConnectionError if this rank shall have no peers."""
        if not self._has_peers:
            raise ConnectionError("this rank was started for an instance of one rank")
        self._met.add(peer.member)

    @property
    def memory_links(self) -> tuple[Member, ...]:
        return ()

    def is_open(self, target: Member) -> bool:
        return target in self._met

    def forget(self, member: Member) -> None:
        self._met.discard(member)

    def sweep(self) -> None: ...
