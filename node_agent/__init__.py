"""The node agent: gives a host's ranks their lives, and tells etcd at once when one ends."""
