"""Exit codes of a rank's process that its node agent tells apart."""

from __future__ import annotations

EXIT_FENCED = 75
"""A rank's exit code for "a map left me out": not a fault of its own, so no reason to wait."""
