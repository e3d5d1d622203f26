"""What a node agent knows of what etcd holds under `serving/`. One watch brings all of it, in the
order in which it was written: a map is never older than the desired state that is seen with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.changes import Changes
from shared.desired_state import DesiredState
from shared.errors import WireError
from shared.keys import Keys
from shared.records import RankRecord, Verdict, unpack_map, unpack_record
from shared.store import WatchEvent
from shared.types import Incarnation, RankId

News = RankRecord | Verdict


@dataclass(slots=True, kw_only=True)
class ServingView:
    """`members` are those of the newest map; of a rank that it has not, `former_members` has the
    incarnation that was a member last. `malformed` keys hold what no service of ours wrote;
    they count as absent."""

    keys: Keys
    synced: bool = False
    desired: DesiredState = field(default_factory=DesiredState)
    members: dict[RankId, Incarnation] = field(default_factory=dict)
    former_members: dict[RankId, Incarnation] = field(default_factory=dict)
    records: dict[str, RankRecord] = field(default_factory=dict)  # by key
    malformed: set[str] = field(default_factory=set)

    def apply(self, seen: Changes) -> list[News]:
        """Returns the records and verdicts among it."""
        news: list[News] = []
        for event in seen.events:
            try:
                news += self._apply(event)
                self.malformed.discard(event.key)
            except WireError:
                self.malformed.add(event.key)
        self.synced |= seen.synced
        return news

    def _apply(self, event: WatchEvent) -> list[News]:
        keys, key, value = self.keys, event.key, event.value
        if key == keys.desired:
            self.desired = DesiredState() if value is None else unpack_record(value, DesiredState)
        elif key == keys.map:
            members = () if value is None else unpack_map(value).members
            self.former_members |= self.members
            self.members = {m.rank: m.incarnation for m in members}
            for rank in self.members:
                self.former_members.pop(rank, None)
        elif key.startswith(keys.ranks):
            self.records.pop(key, None)
            if value is not None:
                self.records[key] = record = unpack_record(value, RankRecord)
                return [record]
        elif key.startswith(keys.verdicts) and value is not None:
            return [unpack_record(value, Verdict)]
        return []
