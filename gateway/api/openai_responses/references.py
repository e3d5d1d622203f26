"""Items of an input that a client names by their ids instead of sending them, as it may while the
response that they are from is remembered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.api.openai_responses.answer import response_of_item
from gateway.api.openai_responses.store import ResponseStore
from shared.errors import RequestError

REFERENCE = "item_reference"


def with_named_items(
    given: str | Sequence[Any], store: ResponseStore, owner: str
) -> str | Sequence[Any]:
    """The input, with each item in the place of its name. Raises RequestError if one is not
    remembered, or is named twice: what an input grows to is bounded by what is remembered."""
    if isinstance(given, str):
        return given
    items: dict[str, dict[str, Any]] = {}
    read: set[str] = set()
    taken: list[Any] = []
    for index, item in enumerate(given):
        if not _is_reference(item):
            taken.append(item)
            continue
        item_id = item.get("id")
        if not isinstance(item_id, str):
            raise RequestError(f"input[{index}] must have an id, which is a text", param="input")
        response_id = response_of_item(item_id)
        if response_id is not None and response_id not in read:
            read.add(response_id)
            found = store.get(response_id, owner)
            items |= {each["id"]: each for each in ([] if found is None else found.items)}
        if item_id not in items:
            raise _not_found(index, item_id)
        taken.append(items.pop(item_id))
    return taken


def _is_reference(item: Any) -> bool:
    """A reference may come without its type."""
    if not isinstance(item, dict):
        return False
    return item.get("type") == REFERENCE or (item.get("type") is None and item.keys() == {"id"})


def _not_found(index: int, item_id: str) -> RequestError:
    return RequestError(
        f"input[{index}]: the item {item_id!r:.80} is not remembered here: it is unknown, is named "
        "twice, has made room for newer ones, or another gateway has it; send the item itself, as "
        "clients do that ask for store=false",
        param="input",
        code="item_not_found",
    )
