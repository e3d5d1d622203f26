"""Replicas of running sessions' KV blocks in the host memory of other ranks.
`engine.kv_replication` explains how they work, `writer` sends and restores them, and
`mooncake_replicator` stores and transports them."""
