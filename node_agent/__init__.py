"""The node agent: starts and restarts a host's ranks, and reports to etcd at once when one
exits."""
