"""The signals that a rank may be sent, by the names that flags use."""

from __future__ import annotations

import signal

SIGNALS = {
    "KILL": signal.SIGKILL,
    "STOP": signal.SIGSTOP,
    "CONT": signal.SIGCONT,
    "TERM": signal.SIGTERM,
}
