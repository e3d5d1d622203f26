"""The vocabulary that all services share: ids, wire messages, etcd keys, config, errors, clock."""
