"""Which jobs a grammar child has begun and not ended, and what they have cost so far. Pure."""

from __future__ import annotations


class RunningJobs:
    """The child runs at most one compilation and one step at a time, and steps in the order in
    which they were sent. Times are the child's CPU seconds."""

    def __init__(self) -> None:
        self._compiling: int | None = None
        self._compiling_since_s = 0.0
        self._steps: dict[int, None] = {}
        self._step_since_s = 0.0

    def on_began(self, job: int, cpu_s: float) -> None:
        self._compiling, self._compiling_since_s = job, cpu_s

    def on_step_sent(self, job: int, cpu_s: float) -> None:
        if not self._steps:
            self._step_since_s = cpu_s
        self._steps[job] = None

    def on_ended(self, job: int, cpu_s: float) -> None:
        if job in self._steps:
            del self._steps[job]
            self._step_since_s = cpu_s
        elif job == self._compiling:
            self._compiling = None

    @property
    def suspect(self) -> int | None:
        """The job to blame if the child dies now. Compilations are far more likely to be."""
        return next(iter(self._steps), None) if self._compiling is None else self._compiling

    def overrun(self, cpu_s: float, *, compile_s: float, step_s: float) -> int | None:
        """The job that has used up its budget. A step is charged with a compilation beside it, too,
        so it is allowed as much more."""
        if self._compiling is not None and cpu_s - self._compiling_since_s > compile_s + step_s:
            return self._compiling
        if self._steps and cpu_s - self._step_since_s > step_s + compile_s:
            return next(iter(self._steps))
        return None
