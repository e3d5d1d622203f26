"""`starfish bench`: measures a running instance from its clients' side."""
