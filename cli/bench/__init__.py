"""`starfish bench`: measures an instance as its clients see it."""
