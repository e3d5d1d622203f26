"""As whom a process reaches etcd: what is impossible is said at once, and no secret is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.etcd_options import PASSWORD_VARIABLE, EtcdOptions
from shared.secret import write_private_file

SECRET = "a password that is secret"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    write_private_file(path, f"{SECRET}\n".encode())
    return path


def test_what_is_whole_passes(file: Path) -> None:
    EtcdOptions().check()
    EtcdOptions(etcd_ca=file, etcd_cert=file, etcd_key=file, etcd_server_name="e").check()
    EtcdOptions(etcd="far:1", etcd_ca=file, etcd_user="u", etcd_password_file=file).check()
    EtcdOptions(etcd="127.0.0.1:1,localhost:2", etcd_user="u").check()


def test_what_contradicts_itself_is_named(file: Path) -> None:
    for options, flag in (
        (EtcdOptions(etcd_ca=file, etcd_cert=file), "--etcd-key"),
        (EtcdOptions(etcd_cert=file, etcd_key=file), "--etcd-ca"),
        (EtcdOptions(etcd_server_name="e"), "--etcd-ca"),
        (EtcdOptions(etcd_password_file=file), "--etcd-user"),
        (EtcdOptions(etcd="far:1", etcd_user="u"), "--etcd-ca"),
        (EtcdOptions(etcd_ca=Path("/nowhere")), "--etcd-ca"),
    ):
        with pytest.raises(ConfigError, match=flag):
            options.check()


def test_a_key_or_password_that_others_can_read_is_refused(file: Path) -> None:
    file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"--etcd-key .*chmod 600"):
        EtcdOptions(etcd_ca=file, etcd_cert=file, etcd_key=file).check()
    with pytest.raises(ConfigError, match=r"--etcd-password-file .*chmod 600"):
        EtcdOptions(etcd_user="u", etcd_password_file=file).password({})


def test_a_password_comes_from_a_file_or_the_environment(file: Path) -> None:
    environ = {PASSWORD_VARIABLE: "of the environment"}
    assert EtcdOptions().password(environ) is None
    assert EtcdOptions(etcd_user="u").password(environ) == "of the environment"
    assert EtcdOptions(etcd_user="u", etcd_password_file=file).password(environ) == SECRET
    with pytest.raises(ConfigError, match=PASSWORD_VARIABLE):
        EtcdOptions(etcd_user="u").password({})


def test_its_flags_say_the_same_and_nothing_secret(file: Path) -> None:
    options = EtcdOptions(
        etcd="e:1",
        etcd_ca=file,
        etcd_cert=file,
        etcd_key=file,
        etcd_server_name="n",
        etcd_user="u",
        etcd_password_file=file,
    )
    flags = options.flags()
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    assert values == {
        "--etcd": "e:1",
        **dict.fromkeys(
            ("--etcd-ca", "--etcd-cert", "--etcd-key", "--etcd-password-file"), str(file)
        ),
        "--etcd-server-name": "n",
        "--etcd-user": "u",
    }
    assert SECRET not in " ".join(flags) + repr(options)
