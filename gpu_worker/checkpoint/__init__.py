"""Reads checkpoints, for CPU ranks and CUDA ranks."""
