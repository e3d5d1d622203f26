"""Who may write what in etcd: the table behind its users and roles. Every service reads all keys of
its instance, and writes no more than it has to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from shared.keys import Keys
from shared.types import Accuser

ROOT = "root"
"""etcd's own name for the user, and the role, that may do everything."""


class EtcdService(Enum):
    """The kinds of processes that use etcd. A value is a part of the name of its user."""

    CONTROL_PLANE = "control-plane"
    GATEWAY = "gateway"
    AGENT = "agent"
    RANK = "rank"
    OPERATOR = "operator"  # `starfish up`
    READER = "reader"  # commands that show: `starfish status`, `starfish watch`


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class KeyRange:
    """A key alone, or, if it ends with a slash, all keys that begin with it."""

    key: str
    writable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A user of etcd, and its one role, which has the same name."""

    name: str
    permissions: frozenset[KeyRange]


def writable_keys(keys: Keys) -> Mapping[EtcdService, tuple[str, ...]]:
    """Keys, and prefixes that end with a slash. An agent also has what its ranks write: etcd lets
    nobody revoke a lease who may not write all keys under it."""
    rank = (keys.ranks, keys.residents, keys.suspicions_by(Accuser.RANK), keys.incarnation_counters)
    return {
        EtcdService.CONTROL_PLANE: (keys.root,),
        EtcdService.GATEWAY: (keys.gateways, keys.suspicions_by(Accuser.GATEWAY)),
        EtcdService.AGENT: (keys.agents, keys.views, keys.suspicions_by(Accuser.AGENT), *rank),
        EtcdService.RANK: rank,
        EtcdService.OPERATOR: (keys.owner, keys.leader),
        EtcdService.READER: (),
    }


def accounts(keys: Keys) -> tuple[Account, ...]:
    """All users that an instance needs. An instance's users cannot touch another instance."""
    return tuple(
        Account(
            name=user_of(keys, service),
            permissions=frozenset(
                {
                    KeyRange(key=keys.root, writable=keys.root in writable),
                    *(KeyRange(key=key, writable=True) for key in writable),
                }
            ),
        )
        for service, writable in writable_keys(keys).items()
    )


def user_of(keys: Keys, service: EtcdService) -> str:
    return f"starfish-{keys.instance}-{service.value}"
