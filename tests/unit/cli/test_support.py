"""A bundle holds no secret: neither those that are known, nor what looks like one."""

from __future__ import annotations

import json
import stat
import tarfile
from pathlib import Path

import pytest

from cli.support.bundle import open_bundle
from cli.support.redaction import REMOVED, Redactor, known_secrets
from shared.api_key import new_api_key, spelt_hash
from shared.errors import ConfigError

PEM = (
    "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIIrYSSNQFaA2Hwf1duRSxKtLYX5CB04fSeQ6tF1aY/PuoAoGCCqG\n"
)


def clean(text: str, *secrets: bytes) -> str:
    return Redactor(secrets).clean(text.encode()).decode()


@pytest.mark.parametrize(
    "secret",
    [
        "password=hunter2hunter2",
        'STARFISH_ETCD_PASSWORD="hunter2hunter2"',
        '"api_key": "hunter2hunter2"',
        "Authorization: Bearer hunter2hunter2",
        "header='authorization: Basic aHVudGVyMmh1bnRlcjI='",
        "https://root:hunter2hunter2@etcd-1:2379/x",
        "OTEL_EXPORTER_OTLP_HEADERS=x-auth-token=hunter2hunter2",
        "OTEL_EXPORTER_OTLP_HEADERS=x-team=hunter2hunter2,x-other=hunter2hunter2 hunter2",
        '"OTEL_EXPORTER_OTLP_TRACES_HEADERS": "x-team=hunter2hunter2"',
        "hf_hunter2hunter2hunter2",
        pytest.param(f"key {new_api_key()} is wrong", id="api_key"),
        f"hash = '{spelt_hash('x')}'",
        PEM + "-----END EC PRIVATE KEY-----",
        PEM,  # cut off
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
    ],
)
def test_what_looks_like_a_secret_is_removed(secret: str) -> None:
    cleaned = clean(f"before\n{secret}\n")
    assert cleaned.startswith("before\n")
    assert REMOVED in cleaned
    for part in ("hunter2", "aHVudGVy", "MHcCAQ", "eyJzdWIi", spelt_hash("x")[10:]):
        assert part not in cleaned
    if "sk-starfish-" in secret:
        assert secret.split()[1] not in cleaned


@pytest.mark.parametrize(
    "text",
    [
        "--secret-file /run/starfish/default/secret --api-key-file /etc/keys.toml",
        '"secret_file": "/run/secret", "etcd_password_file": "/x/y"',
        "request prompt_tokens=12345 generated_tokens=67890 status=200",
        'starfish_gateway_key_requests_total{key="alice",status="200"} 3.0',
        "vllm:prompt_tokens_total 1234567.0",
        '"tokenizer_path": "/models/x", "token_ids": [12345]',
    ],
)
def test_what_helps_stays(text: str) -> None:
    assert clean(text) == text


def test_a_known_secret_is_removed_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("0123456789abcdef0123456789abcdef\n")
    (tmp_path / "etcd").mkdir()
    (tmp_path / "etcd" / "root.key").write_text(PEM)
    (tmp_path / "etcd" / "root.pem").write_text("-----BEGIN CERTIFICATE-----\nMIIBpublic==\n")
    variables = {"MY_TOKEN": "from-the-environment", "OTEL_EXPORTER_OTLP_HEADERS": "x-team=of-team"}
    found = set(known_secrets(variables, [], [tmp_path]))
    assert found == {
        b"of-team",
        *(b"0123456789abcdef0123456789abcdef", b"from-the-environment"),
        PEM.splitlines()[1].encode(),
    }
    cleaned = clean("x0123456789abcdef0123456789abcdefx from-the-environment", *found, b"", b"x")
    assert cleaned == f"x{REMOVED}x {REMOVED}"


def test_bytes_that_are_no_text_stay_as_they_are() -> None:
    assert Redactor([]).clean(b"\xff\x00abc") == b"\xff\x00abc"


def test_a_bundle_says_what_is_in_it_and_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    with open_bundle(path, Redactor([b"top-secret-word"])) as bundle:
        bundle.add("a.txt", b"a top-secret-word here")
        bundle.add_missing("b.txt", "it is not there")
        assert bundle.missing == ["b.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with tarfile.open(path) as tar:
        contents = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
    assert contents["b/a.txt"] == f"a {REMOVED} here".encode()
    told = json.loads(contents["b/contents.json"])
    assert told["missing"] == {"b.txt": "it is not there"}
    with pytest.raises(ConfigError, match="File exists"), open_bundle(path, Redactor([])):
        pass
