"""Where ranks talk in a forward: the seam, and its implementations."""
