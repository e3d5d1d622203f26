"""Keeps apart what llguidance does not: a special token, and its name as text. Hands the library a
tokenizer that makes ordinary tokens of any text, and a client's grammar with ids for names. Pure.

A grammar's forced bytes are tokenised, and a tokenizer finds the names of its special tokens in any
text; so the answer would get a special token, which has no text, where the grammar demands some."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from shared.errors import GrammarError

_FAITHFUL = ("Prepend", "Replace")  # normalisers that only spell spaces
_END_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>")

_LARK_PART = re.compile(
    r"""(?://|\#)[^\n]*                  # a comment
      | "(?:\\.|[^"\\\n])*"              # a text
      | /(?:\\.|[^/\\])+/                # a regular expression
      | (?P<token><[^<>\s\[][^<>\s]*>)   # a special token by its name, not by its id
    """,
    re.VERBOSE,
)


class PlainTokenizer(NamedTuple):
    """`file` is a tokenizer.json that leaves the bytes of a text as they are and finds no special
    token in it; these have names that nobody can spell. `special_ids` are the real names' ids,
    `end_ids` those of them that end a text."""

    file: dict[str, Any]
    special_ids: Mapping[str, int]
    end_ids: Sequence[int]


def plain_tokenizer(file: Mapping[str, Any], secret: str) -> PlainTokenizer:
    """`secret` is a text that no client knows."""
    added = file.get("added_tokens") or []
    special_ids = {each["content"]: int(each["id"]) for each in added if _is_special(each)}
    renamed = {name: f"<{secret}:{token}>" for name, token in special_ids.items()}
    plain = {
        **file,
        "added_tokens": [_plain_token(each, renamed) for each in added],
        "model": _renamed_model(file["model"], renamed) if renamed else file["model"],
        "normalizer": _faithful(file.get("normalizer")),
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    end_ids = tuple(special_ids[name] for name in _END_NAMES if name in special_ids)
    return PlainTokenizer(plain, special_ids, end_ids)


def with_ids(lark: str, special_ids: Mapping[str, int]) -> str:
    """A grammar in Lark that names special tokens by their ids alone. Raises GrammarError if there
    is no token of a name."""

    def by_id(part: re.Match[str]) -> str:
        name = part["token"]
        if name is None:
            return part.group()
        if name not in special_ids:
            raise GrammarError(f"there is no special token {name:.80}")
        return f"<[{special_ids[name]}]>"

    return _LARK_PART.sub(by_id, lark)


def _is_special(added: Mapping[str, Any]) -> bool:
    """As the library has it."""
    name = added["content"]
    return bool(added.get("special")) or (name.startswith("<") and name.endswith(">"))


def _plain_token(added: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """One that takes no white space of its neighbours."""
    plain = {**added, "lstrip": False, "rstrip": False}
    if added["content"] in renamed:
        plain |= {"content": renamed[added["content"]], "special": True, "normalized": False}
    return plain


def _renamed_model(model: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    vocab, unknown = model["vocab"], model.get("unk_token")
    plain = dict(model)
    if isinstance(vocab, dict):
        plain["vocab"] = {renamed.get(piece, piece): token for piece, token in vocab.items()}
    else:
        plain["vocab"] = [[renamed.get(piece, piece), score] for piece, score in vocab]
    if unknown is not None and unknown in renamed:
        plain["unk_token"] = renamed[unknown]
    if model.get("merges"):
        plain["merges"] = [each for each in model["merges"] if not _concerns(each, renamed)]
    return plain


def _concerns(merge: str | Sequence[str], renamed: Mapping[str, str]) -> bool:
    """Whether a merge makes one of these tokens, or is made of one."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first + second in renamed or first in renamed or second in renamed


def _faithful(normalizer: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Without what makes other text of a text, be it NFC or not."""
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    kept = [step for step in steps if step.get("type") in _FAITHFUL]
    return {"type": "Sequence", "normalizers": kept} if kept else None
