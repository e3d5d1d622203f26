"""Guided decoding by llguidance, in a child process that can be killed."""
