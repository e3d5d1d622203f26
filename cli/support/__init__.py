"""`starfish support-bundle`: what somebody else needs to look into a problem, without secrets."""
