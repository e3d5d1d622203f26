"""Salts: who shares KV blocks with whom."""

from __future__ import annotations

from gateway.cache_salt import CacheSalts

SECRET = b"a secret of thirty-two characters"


def test_every_key_has_a_salt_of_its_own_on_all_gateways() -> None:
    salts = [CacheSalts(SECRET, share=False).salt_of(name) for name in ("a", "b", "ab")]
    assert len({*salts, b""}) == 4
    assert salts[0] == CacheSalts(SECRET, share=False).salt_of("a")


def test_without_keys_or_by_choice_all_share() -> None:
    assert CacheSalts(SECRET, share=False).salt_of("") == b""
    assert CacheSalts(SECRET, share=True).salt_of("a") == b""


def test_a_requests_own_salt_divides_further_and_joins_nobody() -> None:
    for share in (False, True):
        salts = CacheSalts(SECRET, share=share)
        made = {salts.salt_of("a", "x"), salts.salt_of("a", "y"), salts.salt_of("a")}
        assert len(made) == 3
    salts = CacheSalts(SECRET, share=False)
    assert salts.salt_of("a", "bx") != salts.salt_of("ab", "x")
    assert salts.salt_of("a", "x") != salts.salt_of("b", "x")
    assert salts.salt_of("", "a") != salts.salt_of("a")


def test_who_does_not_know_the_secret_cannot_make_a_salt() -> None:
    assert CacheSalts(b"", share=False).salt_of("a") != CacheSalts(SECRET, share=False).salt_of("a")
