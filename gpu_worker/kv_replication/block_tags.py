"""The tag of a replica: proves that a member of the instance wrote exactly these bytes as the block
of this name. Mooncake lets whoever reaches the data network write to a region, so that a replica is
believed only with its tag, which comes over the control connection.

GMAC, the authentication of AES-GCM alone: on CPUs with AES instructions it is ten times faster than
any keyed hash. It needs a nonce that is never used twice with a key; a random one of 96 bits is
enough for 2^32 blocks."""

from __future__ import annotations

import hmac
import os

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from gpu_worker.engine.kv_replication import Bytes
from shared.handshake import Access

NONCE_BYTES = 12
MAC_BYTES = 16
TAG_BYTES = NONCE_BYTES + MAC_BYTES


class BlockTags:
    """Any thread. Without a secret anybody can make tags: then they find damage alone."""

    def __init__(self, access: Access) -> None:
        purpose = b"starfish kv replicas " + access.instance.encode()
        self._cipher = AESGCM(hmac.digest(access.secret, purpose, "sha256"))

    def tag(self, name: bytes, content: Bytes) -> bytes:
        """TAG_BYTES. `content` is uint8 and contiguous, and does not change meanwhile."""
        return self._tag(os.urandom(NONCE_BYTES), name, content)

    def is_genuine(self, name: bytes, content: Bytes, tag: bytes) -> bool:
        """`tag` has TAG_BYTES."""
        expected = self._tag(tag[:NONCE_BYTES], name, content)
        return hmac.compare_digest(tag, expected)

    def _tag(self, nonce: bytes, name: bytes, content: Bytes) -> bytes:
        """The name is encrypted for the sake of its own authentication, and thrown away."""
        return nonce + self._cipher.encrypt(nonce, name, content.data)[-MAC_BYTES:]
