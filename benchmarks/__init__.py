"""Measurements; nothing here runs in a service."""
