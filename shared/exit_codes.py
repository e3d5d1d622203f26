"""Exit codes of a rank's process that its node agent tells apart."""

from __future__ import annotations

EXIT_FENCED = 75
"""A rank exits with this code after a verdict, or a map without it. That is no fault of its own, so
the node agent restarts it at once."""
