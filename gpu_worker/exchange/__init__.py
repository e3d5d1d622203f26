"""Where ranks talk in a forward: the interface, and its implementations."""
