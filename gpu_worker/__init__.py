"""One data-parallel rank, and the node agent that starts a host's ranks."""
