"""The `starfish` command: brings an instance up, shows it, breaks it on purpose, measures it."""
