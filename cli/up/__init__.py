"""`starfish up`: a whole instance on one host, from nothing to the first tokens, and back."""
