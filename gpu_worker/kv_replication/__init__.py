"""Copies of running sessions' KV blocks in the host memory of other ranks: `ports` says how they
work, `writer` sends and restores them, `mooncake_replicator` keeps and carries them."""
