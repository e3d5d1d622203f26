"""The shared weights of a model on a CUDA device; those of experts are in `experts`."""
