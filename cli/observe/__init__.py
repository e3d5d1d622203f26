"""Observes a running instance from outside: status, watch, kill."""
