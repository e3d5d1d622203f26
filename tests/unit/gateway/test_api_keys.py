"""Files of API keys: what is read from them, and what makes one unusable."""

from __future__ import annotations

import pytest

from gateway.api_keys import ApiKey, KeyLimits, joined, parse_environment, parse_keys
from shared.api_key import KEY_PREFIX, new_api_key, spelt_hash
from shared.errors import ConfigError

ALICE, BOB = (KEY_PREFIX + letter * 43 for letter in "ab")
HASH = spelt_hash(ALICE)


def test_an_entry_has_defaults_and_its_own_limits() -> None:
    keys = parse_keys(f"""
        [defaults]
        requests_per_minute = 60
        weight = 2.0
        [keys.alice]
        hash = "{HASH}"
        tokens_max = 1000
        priority_min = -5
        [keys."team.b"]
        hash = ["{spelt_hash(BOB)}", "{spelt_hash(new_api_key())}"]
        requests_per_minute = 6
        reads_metrics = true
    """)
    assert keys.find(ALICE) == ApiKey(
        name="alice",
        limits=KeyLimits(requests_per_minute=60, tokens_max=1000),
        weight=2.0,
        priority_min=-5,
    )
    found = keys.find(BOB)
    assert found is not None
    assert (found.name, found.limits.requests_per_minute, found.reads_metrics) == (
        "team.b",
        6,
        True,
    )
    assert keys.names == {"alice", "team.b"}


@pytest.mark.parametrize(
    "wrong", ["", ALICE[:-1], ALICE + "x", HASH, HASH.removeprefix("sha256:"), "alice", "\udcff"]
)
def test_nothing_but_the_key_itself_is_a_key(wrong: str) -> None:
    assert parse_keys(f'[keys.alice]\nhash = "{HASH}"').find(wrong) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "keys"),
        ("[keys]", "no key"),
        ("[keys.alice", "not a file of API keys: Expected"),
        ('[keys.alice]\nhash = "sha256:00"', r"\[keys.alice\]: a hash is"),
        (f'[keys.alice]\nhash = "{ALICE}"', "a hash is"),
        ("[keys.alice]\nweight = 1.0", "has no hash"),
        (f'[keys.alice]\nhash = "{HASH}"\nweigth = 1.0', "weigth"),
        (f'[keys.alice]\nhash = "{HASH}"\nweight = 0.0', "weight"),
        (f'[keys.alice]\nhash = "{HASH}"\ntokens_max = 0', "tokens_max"),
        (f'[keys.alice]\nhash = "{HASH}"\ntokens_max = "9"', "tokens_max"),
        (f'[keys.alice]\nhash = "{HASH}"\npriority = 1\npriority_min = 2', "below priority_min"),
        (f'[keys."a b"]\nhash = "{HASH}"', "no name of a key"),
        (f'[keys.a]\nhash = "{HASH}"\n[keys.b]\nhash = "{HASH}"', "same key"),
        (f'[keys.a]\nhash = "{HASH}"\n[keys.a]\nhash = "{HASH}"', "TOML|keys"),
        (f'[default]\nweight = 1.0\n[keys.a]\nhash = "{HASH}"', "default"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_keys(text)
    assert ALICE not in str(caught.value)


def test_the_environment_has_keys_or_their_hashes() -> None:
    keys = parse_environment(f"alice={ALICE}, bob={spelt_hash(BOB)},")
    found = [keys.find(text) for text in (ALICE, BOB)]
    assert [key and key.name for key in found] == ["alice", "bob"]


@pytest.mark.parametrize(
    "text",
    ["alice", "alice=short", f"a={ALICE},a={BOB}", "=" + ALICE, "a b=" + ALICE, "a=sha256:1"],
)
def test_a_wrong_environment_is_refused_and_shows_no_key(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_environment(text)
    assert ALICE not in str(caught.value)


def test_a_name_comes_from_one_place() -> None:
    one = parse_environment(f"alice={ALICE}")
    assert joined(one, parse_environment(f"bob={BOB}")).names == {"alice", "bob"}
    with pytest.raises(ConfigError, match="both"):
        joined(one, parse_environment(f"alice={BOB}"))


def test_keys_are_long_and_never_the_same() -> None:
    made = {new_api_key() for _ in range(100)}
    assert len(made) == 100
    assert min(map(len, made)) >= 40
