"""The only place that spells an etcd key. All keys of one instance live under one prefix, and those
that serving follows under one of their own: ranks and gateways watch nothing else, because a death
makes others write a lot at the very moment that counts."""

from __future__ import annotations

from dataclasses import dataclass

from shared.types import Incarnation, NodeId, RankId


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of the instance named `instance`. Values: see `shared.records`."""

    instance: str = "default"

    @property
    def root(self) -> str:
        return f"/starfish/{self.instance}/"

    @property
    def serving(self) -> str:
        """Prefix of the spec, the map, and what is known of ranks and told to them."""
        return self.root + "serving/"

    @property
    def spec(self) -> str:
        """InstanceSpec: the model and the number of ranks. Not leased."""
        return self.serving + "spec"

    @property
    def leader(self) -> str:
        """LeaderRecord under the active control plane's lease."""
        return self.root + "leader"

    @property
    def term(self) -> str:
        """int: the number of elections so far, written with the leader key. Not leased."""
        return self.root + "term"

    @property
    def map(self) -> str:
        """ExpertMap. Not leased: it outlives every control plane."""
        return self.serving + "map"

    @property
    def ranks(self) -> str:
        return self.serving + "ranks/"

    def rank(self, rank: RankId, incarnation: Incarnation) -> str:
        """RankRecord under the rank's lease. A key per incarnation: a life that wakes up late can
        not overwrite its successor's record."""
        return f"{self.ranks}{rank:05d}/{incarnation:08d}"

    @property
    def residents(self) -> str:
        return self.root + "residents/"

    def resident(self, rank: RankId, incarnation: Incarnation) -> str:
        """SlotContents under the rank's lease: the experts whose weights its slots really hold."""
        return f"{self.residents}{rank:05d}/{incarnation:08d}"

    @property
    def assignments(self) -> str:
        return self.serving + "assignments/"

    def assignment(self, rank: RankId, incarnation: Incarnation) -> str:
        """SlotContents that the control plane wants a rank to load. Only slots that are empty in
        the map may differ from what is resident."""
        return f"{self.assignments}{rank:05d}/{incarnation:08d}"

    @property
    def suspicions(self) -> str:
        return self.root + "suspicions/"

    def suspicion(self, rank: RankId, incarnation: Incarnation, by: str) -> str:
        """Suspicion under the accuser's lease."""
        return f"{self.suspicions}{rank:05d}/{incarnation:08d}/{by}"

    @property
    def verdicts(self) -> str:
        return self.serving + "verdicts/"

    def verdict(self, rank: RankId, incarnation: Incarnation) -> str:
        """Verdict, written at the latest together with the map without the rank."""
        return f"{self.verdicts}{rank:05d}/{incarnation:08d}"

    def incarnation_counter(self, rank: RankId) -> str:
        return f"{self.root}incarnations/{rank:05d}"

    @property
    def agents(self) -> str:
        return self.root + "agents/"

    def agent(self, node: NodeId) -> str:
        """AgentRecord under the node agent's lease."""
        return self.agents + node

    @property
    def gateways(self) -> str:
        return self.root + "gateways/"

    def gateway(self, gateway_id: str) -> str:
        """GatewayRecord under the gateway's lease."""
        return self.gateways + gateway_id
