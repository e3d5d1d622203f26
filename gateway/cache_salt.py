"""Salts of KV blocks' names: who may share blocks with whom."""

from __future__ import annotations

import hmac

SALT_CHARACTERS_MAX = 256


class CacheSalts:
    """Clients with keys do not share blocks, unless `share`. Without keys there is one client. A
    request's own `cache_salt` keeps its blocks apart from those of its client's other requests.

    A salt is a keyed hash, so nobody who does not know the instance's secret can make the names of
    another client's blocks. All gateways of an instance make the same salts."""

    def __init__(self, secret: bytes, *, share: bool) -> None:
        self._secret = secret
        self._share = share

    def salt_of(self, tenant: str, cache_salt: str = "") -> bytes:
        """32 bytes, or none at all for blocks that everybody shares."""
        owner = "" if self._share else tenant
        if not owner and not cache_salt:
            return b""
        # A name has no zero byte, so no two pairs are spelt alike.
        spelt = b"prefix cache\0" + owner.encode() + b"\0" + cache_salt.encode()
        return hmac.digest(self._secret, spelt, "sha256")
