"""The only place that spells an etcd key. All keys of one instance share a prefix. The keys that
ranks and gateways watch share a longer one, `serving/`: a death makes many processes write
suspicions and residents at once, and ranks and gateways must not be woken by those."""

from __future__ import annotations

from dataclasses import dataclass

from shared.types import Accuser, Incarnation, NodeId, RankId


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of the instance named `instance`. Values: see `shared.records`."""

    instance: str = "default"

    @property
    def root(self) -> str:
        return f"/starfish/{self.instance}/"

    @property
    def serving(self) -> str:
        """Prefix of the spec, the map, the rank records, the assignments and the verdicts."""
        return self.root + "serving/"

    @property
    def spec(self) -> str:
        """InstanceSpec. No lease."""
        return self.serving + "spec"

    @property
    def desired(self) -> str:
        """DesiredState. No lease. Ranks, gateways and agents follow it."""
        return self.serving + "desired"

    @property
    def leader(self) -> str:
        """LeaderRecord under the active control plane's lease."""
        return self.root + "leader"

    @property
    def owner(self) -> str:
        """OwnerRecord under the lease of the `starfish up` that runs the instance."""
        return self.root + "owner"

    @property
    def term(self) -> str:
        """int: the number of elections so far, written together with the leader key. No lease."""
        return self.root + "term"

    @property
    def first_epoch(self) -> str:
        """int: no map of the present term has a lower epoch; written with the term. No lease."""
        return self.root + "first_epoch"

    @property
    def map(self) -> str:
        """ExpertMap. No lease: it outlives every control plane."""
        return self.serving + "map"

    @property
    def ranks(self) -> str:
        return self.serving + "ranks/"

    def incarnations(self, rank: RankId) -> str:
        """Prefix of the records of one rank."""
        return f"{self.ranks}{rank:05d}/"

    def rank(self, rank: RankId, incarnation: Incarnation) -> str:
        """RankRecord under the rank's lease. Every incarnation has its own key, so that one that
        wakes up late cannot overwrite its successor's record."""
        return f"{self.incarnations(rank)}{incarnation:08d}"

    @property
    def residents(self) -> str:
        return self.root + "residents/"

    def resident(self, rank: RankId, incarnation: Incarnation) -> str:
        """SlotContents under the rank's lease: the experts that its slots really hold."""
        return f"{self.residents}{rank:05d}/{incarnation:08d}"

    @property
    def assignments(self) -> str:
        return self.serving + "assignments/"

    def assignment(self, rank: RankId, incarnation: Incarnation) -> str:
        """SlotContents that the control plane wants a rank to hold. No lease; the control plane
        deletes it after the incarnation has gone. It differs from what is resident only in slots
        that the map leaves empty, or, after a death, in slots of surplus replicas that orphans
        take."""
        return f"{self.assignments}{rank:05d}/{incarnation:08d}"

    @property
    def suspicions(self) -> str:
        return self.root + "suspicions/"

    def suspicions_by(self, accuser: Accuser) -> str:
        """The prefix of all suspicions that this kind of process raises: others may not."""
        return f"{self.suspicions}{accuser.value}/"

    def suspicions_of(self, rank: RankId, incarnation: Incarnation, accuser: Accuser) -> str:
        """The prefix of all suspicions of one incarnation by this kind of process."""
        return f"{self.suspicions_by(accuser)}{rank:05d}/{incarnation:08d}/"

    def suspicion(self, rank: RankId, incarnation: Incarnation, accuser: Accuser, by: str) -> str:
        """Suspicion under the accuser's lease. `by` names the accuser."""
        return self.suspicions_of(rank, incarnation, accuser) + by

    @property
    def leader_doubts(self) -> str:
        """What ranks say of the control plane that leads."""
        return self.suspicions_by(Accuser.RANK) + "leader/"

    def leader_doubt(self, rank: RankId, incarnation: Incarnation) -> str:
        """LeaderDoubt of that rank, under its lease."""
        return f"{self.leader_doubts}{rank:05d}/{incarnation:08d}"

    @property
    def views(self) -> str:
        return self.root + "views/"

    def view(self, rank: RankId, incarnation: Incarnation) -> str:
        """ProcessView under the lease of the rank's node agent."""
        return f"{self.views}{rank:05d}/{incarnation:08d}"

    @property
    def verdicts(self) -> str:
        return self.serving + "verdicts/"

    def verdict(self, rank: RankId, incarnation: Incarnation) -> str:
        """Verdict. Written before the first map without the member, or in the same transaction,
        under a lease of the control plane that lasts some minutes."""
        return f"{self.verdicts}{rank:05d}/{incarnation:08d}"

    @property
    def incarnation_counters(self) -> str:
        return self.root + "incarnations/"

    def incarnation_counter(self, rank: RankId) -> str:
        """Decimal digits: the highest incarnation given to the rank so far. No lease."""
        return f"{self.incarnation_counters}{rank:05d}"

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
