"""Whose sessions ranks are told to be in flight."""

from __future__ import annotations

from gateway.tenants_in_flight import TenantsInFlight


def test_a_tenant_is_named_when_it_comes_and_until_others_are_to_be_forgotten() -> None:
    tenants = TenantsInFlight()
    assert tenants.begin("a")
    assert not tenants.begin("a"), "it is named already"
    tenants.end("a")
    assert not tenants.forget_gone(), "it has another session"
    tenants.end("a")
    assert tenants.named == ("a",)
    assert not tenants.begin("a"), "short requests in a row are one"
    tenants.end("a")
    assert tenants.forget_gone()
    assert tenants.named == ()


def test_two_are_named_and_others_take_the_place_of_one_that_has_gone() -> None:
    tenants = TenantsInFlight()
    assert [tenants.begin(name) for name in "abc"] == [True, True, False]
    assert tenants.named == ("a", "b")
    tenants.end("a")
    assert tenants.forget_gone()
    assert tenants.named == ("b", "c")
    assert not tenants.forget_gone()
