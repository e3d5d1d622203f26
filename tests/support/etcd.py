"""How tests' processes reach a real etcd: each as the user that it is in an instance."""

from __future__ import annotations

from shared.embedded_etcd import EmbeddedEtcd
from shared.etcd_permissions import EtcdService
from shared.keys import Keys


def flags_of(etcd: EmbeddedEtcd, keys: Keys, service: EtcdService) -> tuple[str, ...]:
    """Of an instance that was admitted."""
    return (*etcd.options(keys, service).flags(), "--instance", keys.instance)
