"""Exit codes of a rank's process that its node agent tells apart."""

from __future__ import annotations

EXIT_FENCED = 75
"""A rank exits with this code if it was fenced, by a verdict or a map without it, and cannot go on
as a new incarnation of its process. That is no fault of its own, so the node agent restarts it at
once."""
