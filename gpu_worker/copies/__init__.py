"""Copies of running sessions' KV blocks in the host memory of other ranks: `ports` says how they
work, `writer` sends them, `endpoint` keeps and carries them."""
