"""The experts of a CUDA rank: their slots and the sources of their weights."""
