"""Models: checkpoints, layers and CPU kernels."""
