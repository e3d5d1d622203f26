"""The stages of a decoder layer on a CUDA device."""
