"""Tests: unit (pure, fast), sim (seeded schedules), integration (real processes), gpu (CUDA)."""
