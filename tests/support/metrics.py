"""Reads what Prometheus would."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families


def metric_value(text: str, name: str, **labels: str) -> float:
    """The sum of the series of `name` that have these labels. Raises KeyError if there is none."""
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    if not found:
        raise KeyError(f"{name} {labels}")
    return sum(found)


def series_names(text: str) -> set[str]:
    """The names of all series, and of the families that have none yet."""
    names: set[str] = set()
    for family in text_string_to_metric_families(text):
        names |= {sample.name for sample in family.samples} or series_of(family.name, family.type)
    return names


def series_of(family: str, kind: str) -> set[str]:
    """The names of the series of a family."""
    if kind == "histogram":
        return {f"{family}_bucket", f"{family}_sum", f"{family}_count"}
    if kind == "counter":
        return {f"{family}_total"}
    return {f"{family}_info"} if kind == "info" else {family}
