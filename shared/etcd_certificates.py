"""Certificates for etcd: an authority, etcd's own certificate, and one for each of its users, whose
name is the common name. Keys are written closed to other users."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.clock import Clock
from shared.errors import ConfigError
from shared.etcd_credentials import CA_FILE, CA_KEY_FILE
from shared.secret import read_private_file, write_private_file

SERVER = "server"
_LIFE = datetime.timedelta(days=3650)
_SLACK = datetime.timedelta(days=1)
"""Clocks of hosts differ."""
_NAME_CHARACTERS_MAX = 64


class CertificateAuthority:
    """Signs what it puts into `folder`, which is this user's alone."""

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        certificate: x509.Certificate,
        key: ec.EllipticCurvePrivateKey,
    ) -> None:
        self.folder = folder
        self._clock = clock
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(cls, folder: Path, clock: Clock) -> CertificateAuthority:
        """A new one, in place of an earlier one. Raises OSError."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("starfish-etcd-ca")
        basics = x509.BasicConstraints(ca=True, path_length=0)
        certificate = (
            _builder(clock, name, name, key.public_key())
            .add_extension(basics, critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority = cls(folder, clock, certificate, key)
        authority._write_certificate(CA_FILE, certificate)
        write_private_file(folder / CA_KEY_FILE, _pem_of(key))
        return authority

    @classmethod
    def load(cls, folder: Path, clock: Clock) -> CertificateAuthority:
        """Raises ConfigError if it is not there or was damaged, OSError."""
        key_pem = read_private_file(folder / CA_KEY_FILE, flag="the key")
        try:
            certificate = x509.load_pem_x509_certificate((folder / CA_FILE).read_bytes())
            key = serialization.load_pem_private_key(key_pem, password=None)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{folder} has no authority that can be read: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{folder / CA_KEY_FILE} is a key of another kind than ours")
        return cls(folder, clock, certificate, key)

    @classmethod
    def load_or_create(cls, folder: Path, clock: Clock) -> CertificateAuthority:
        """Raises ConfigError, OSError."""
        if (folder / CA_KEY_FILE).exists():
            return cls.load(folder, clock)
        return cls.create(folder, clock)

    @property
    def ca_path(self) -> Path:
        return self.folder / CA_FILE

    def issue_server(self, hosts: Sequence[str]) -> tuple[Path, Path]:
        """Certificate and key of etcd, for clients and among its members. Raises OSError."""
        return self._issue(SERVER, hosts)

    def issue_client(self, user: str, folder: Path | None = None) -> tuple[Path, Path]:
        """Certificate and key of this user, in `folder` if given. Raises ConfigError for a name
        that a certificate cannot carry, OSError."""
        if len(user) > _NAME_CHARACTERS_MAX:
            raise ConfigError(
                f"{user!r} is too long for a certificate: --instance needs a shorter name"
            )
        return self._issue(user, (), folder)

    def _issue(
        self, name: str, hosts: Sequence[str], folder: Path | None = None
    ) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if hosts:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        builder = (
            _builder(self._clock, _name(name), self._certificate.subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        )
        if hosts:
            names = x509.SubjectAlternativeName([_alternative(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        folder = folder or self.folder
        self._write_certificate(f"{name}.pem", certificate, folder)
        write_private_file(folder / f"{name}.key", _pem_of(key))
        return folder / f"{name}.pem", folder / f"{name}.key"

    def _write_certificate(
        self, name: str, certificate: x509.Certificate, folder: Path | None = None
    ) -> None:
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        write_private_file((folder or self.folder) / name, pem)


def _builder(
    clock: Clock,
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
) -> x509.CertificateBuilder:
    now = datetime.datetime.fromtimestamp(clock.wall(), datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SLACK)
        .not_valid_after(now + _LIFE)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
