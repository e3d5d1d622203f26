"""A rank's model on the CPU: its layers, weights and kernels."""
