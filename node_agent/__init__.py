"""The node agent: starts and restarts a host's ranks, and tells etcd at once when one ends."""
