"""Names of full KV blocks. What a block holds is a function of all tokens up to its end, and so is
its name, a hash chain: equal names, equal contents. A chain begins with a salt. Who does not have
it cannot name the blocks of who has, and so neither use them nor learn that they are there."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

# So long that nobody finds two prefixes of one name: cached rows are taken on the name alone.
_NAME_BYTES = 32
_TOKEN_BYTES = array("i").itemsize


def extend_names(
    names: list[bytes], tokens: Sequence[int], block_tokens: int, *, salt: bytes = b""
) -> None:
    """Appends the names of the full blocks of `tokens` that are not named yet. `salt` must be
    nothing that a client chooses (the gateway makes it): it stands where a parent's name would."""
    begin = len(names) * block_tokens
    end = len(tokens) - len(tokens) % block_tokens
    if begin >= end:
        return
    data = array("i", tokens[begin:end]).tobytes()
    parent = names[-1] if names else salt
    nbytes = block_tokens * _TOKEN_BYTES
    for offset in range(0, len(data), nbytes):
        parent = blake2b(parent + data[offset : offset + nbytes], digest_size=_NAME_BYTES).digest()
        names.append(parent)
