"""Admission: how much this gateway accepts at once, of everybody and of each client. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gateway.api_keys import ApiKey
from gateway.cluster_view import ClusterView
from gateway.tenant_account import TenantAccount
from shared.errors import Overloaded
from shared.fair_share import fits_share


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """`tokens_max` bounds prompt + max_tokens of all sessions in flight."""

    tokens_max: int
    sessions_max: int


class Ticket:
    """One request, from its arrival to its end. `admission` made it; the caller must `release` it
    once."""

    def __init__(self, admission: Admission, account: TenantAccount, now: float) -> None:
        self._admission = admission
        self._account = account
        self._entered_at = now
        self._tokens = 0
        self._choices = 0
        self.tokens_used = 0
        """Prompt and generated tokens, as far as known; counts against the rate."""

    def reserve(self, *, tokens: int, choices: int, now: float) -> None:
        """Before work is done for the request: by what can be told from its fields. Raises
        Overloaded, and then nothing has changed."""
        self._admission.check(self._account, tokens=tokens, choices=choices, now=now)
        self._add(tokens, choices, now)

    def correct(self, *, tokens: int, now: float) -> None:
        """Its tokens are known now. Raises Overloaded if these are more than it was taken for and
        do not fit; then it keeps what it has."""
        reserved, choices = self._tokens, self._choices
        self._add(-reserved, -choices, now)
        try:
            if tokens > reserved:
                self._admission.check(self._account, tokens=tokens, choices=choices, now=now)
        except Overloaded:
            tokens = reserved
            raise
        finally:
            self._add(tokens, choices, now)

    def release(self, now: float) -> None:
        self._admission.tokens -= self._tokens
        self._admission.sessions -= self._choices
        assert min(self._admission.tokens, self._admission.sessions) >= 0
        duration_s = now - self._entered_at
        if self._choices:
            self._admission.learn_duration(duration_s)
        self._account.leave(
            tokens=self._tokens,
            choices=self._choices,
            tokens_used=self.tokens_used,
            duration_s=duration_s,
            now=now,
        )

    def _add(self, tokens: int, choices: int, now: float) -> None:
        self._tokens += tokens
        self._choices += choices
        self._admission.tokens += tokens
        self._admission.sessions += choices
        self._account.add_work(tokens=tokens, choices=choices, now=now)


class Admission:
    """A full gateway refuses a request and never queues it: a waiting client would hold memory and
    a connection, and could not choose another gateway. So that a client finds room although others
    would take all of it, one with a name leaves some free (`shared.fair_share`). Nothing that runs
    is stopped for it."""

    _SMOOTHING = 0.2
    _RETRY_MAX_S = 30.0
    _ACCOUNTS_KEPT = 1024

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._session_s = 1.0  # smoothed duration of a session
        self._accounts: dict[str, TenantAccount] = {}
        self.tokens = 0
        self.sessions = 0
        self._ranks_sessions_max: int | None = None

    @property
    def sessions_max(self) -> int:
        """Never more than the ranks can hold, if they tell: what is more would be refused there,
        again and again."""
        most = self._limits.sessions_max
        return most if self._ranks_sessions_max is None else min(most, self._ranks_sessions_max)

    def on_view(self, view: ClusterView) -> None:
        self._ranks_sessions_max = view.sessions_max

    def account_of(self, key: ApiKey, now: float) -> TenantAccount:
        account = self._accounts.get(key.name)
        if account is None:
            if len(self._accounts) >= self._ACCOUNTS_KEPT:
                self._forget_idle(now)
            account = self._accounts[key.name] = TenantAccount(key, now)
        account.use_key(key, now)
        return account

    def enter(self, key: ApiKey, now: float) -> Ticket:
        """A request has come, and nothing is known of it but whose it is. Raises Overloaded."""
        account = self.account_of(key, now)
        account.enter(now)
        return Ticket(self, account, now)

    def check(self, account: TenantAccount, *, tokens: int, choices: int, now: float) -> None:
        """Raises Overloaded if so much more of this client does not fit. What is larger than the
        whole budget fits if nothing else is in flight."""
        account.check_work(tokens=tokens, choices=choices, now=now)
        limits = self._limits
        if self.sessions:
            self._check("requests", self.sessions, choices, self.sessions_max)
            self._check("tokens", self.tokens, tokens, limits.tokens_max)
        if account.key.name and not (
            self._fits(account, account.choices, choices, self.sessions_max - self.sessions)
            and self._fits(account, account.tokens, tokens, limits.tokens_max - self.tokens)
        ):
            raise Overloaded(
                f"this key has {account.choices} choices and {account.tokens} tokens in flight, "
                "and what is free is kept for other keys; retry later",
                retry_after_s=account.retry_after_s(),
            )

    def learn_duration(self, duration_s: float) -> None:
        self._session_s += self._SMOOTHING * (duration_s - self._session_s)

    def retry_after_s(self) -> int:
        """Whole seconds, at least one: about the time in which a tenth of the sessions end."""
        return max(1, math.ceil(min(self._session_s / 10, self._RETRY_MAX_S)))

    def _check(self, name: str, used: int, added: int, limit: int) -> None:
        if used + added > limit:
            raise Overloaded(
                f"{used} {name} are in flight and this request may add {added}, but the limit is "
                f"{limit}; retry later",
                retry_after_s=self.retry_after_s(),
            )

    @staticmethod
    def _fits(account: TenantAccount, used: int, added: int, free: int) -> bool:
        """Whoever has nothing in flight takes what is free, and what is larger than all of it if
        nobody else has anything: `_check` has seen to that."""
        return used == 0 or fits_share(used=used, added=added, free=free, weight=account.key.weight)

    def _forget_idle(self, now: float) -> None:
        for name, account in list(self._accounts.items()):
            if account.is_idle(now):
                del self._accounts[name]
