"""The rank's engine on CUDA. Imported only if there is a CUDA device, because it needs Triton."""
