"""The certificate of a server's port, and its renewal without a restart."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import structlog

from shared.errors import ConfigError

log = structlog.get_logger()

RELOAD_S = 5.0
HANDSHAKE_TIMEOUT_S = 10.0


class ServerCertificate:
    """`context` always has the newest pair of files that could be read. Connections that are open
    keep theirs."""

    def __init__(self, certificate: Path, key: Path, *, flag: str = "--tls") -> None:
        """Raises ConfigError if the files are no certificate chain with its key, in PEM. `flag` is
        what the names of their flags begin with."""
        self._certificate = certificate
        self._key = key
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        try:
            self._seen = self._fingerprint()
            self._load()
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"{flag}-cert {certificate} and {flag}-key {key}: {error}; "
                "pass a PEM chain and its unencrypted key"
            ) from error

    async def follow_files(self) -> None:
        """Loads the files again whenever they have changed, until cancelled. A pair that does not
        fit together (half of a renewal) is left until it does."""
        while True:
            await asyncio.sleep(RELOAD_S)
            self.reload()

    def reload(self) -> None:
        try:
            seen = self._fingerprint()
            if seen == self._seen:
                return
            self._seen = seen
            self._load()
        except (OSError, ssl.SSLError) as error:
            log.error("tls_reload_failed", certificate=str(self._certificate), detail=str(error))
        else:
            log.info("tls_reloaded", certificate=str(self._certificate))

    def _load(self) -> None:
        trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trial.load_cert_chain(self._certificate, self._key, password=_no_password)
        self.context.load_cert_chain(self._certificate, self._key, password=_no_password)

    def _fingerprint(self) -> tuple[bytes, bytes]:
        return self._certificate.read_bytes(), self._key.read_bytes()


def _no_password() -> str:
    """Instead of OpenSSL's question on the terminal."""
    return ""


def trusting(authority: Path, *, flag: str) -> ssl.SSLContext:
    """For a client that believes the certificates of this authority alone. Raises ConfigError,
    which names the `flag`, if the file has none."""
    try:
        return ssl.create_default_context(cafile=str(authority))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{flag} {authority}: {error}; pass certificates in PEM") from error
