"""The rank's engine on CUDA. Imported only where there is a CUDA device: it needs Triton."""
