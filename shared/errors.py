"""The tree of errors that services raise and translate at their edges.

    StarfishError
    ├── ConfigError            a flag, file or environment value is impossible
    ├── CheckpointError        a model folder is missing, truncated or of an unknown architecture
    ├── RequestError           the client asked for something that cannot be done (HTTP 400)
    ├── Unauthenticated        the client has shown no valid API key (HTTP 401)
    ├── Overloaded             admission is full, or the client's part of it; retry later (HTTP 429)
    ├── Unavailable            no live rank can take the work now (HTTP 503)
    ├── StoreError             etcd did not do what was asked
    │   ├── StoreUnavailable   etcd did not answer: the outcome is unknown
    │   ├── TxnConflict        a compared key had changed: definitely not done
    │   └── LeaseLost          the lease is gone: definitely not done
    ├── GrammarError           a grammar is malformed, or does not allow what was generated
    ├── WireError              a frame or message is malformed, or its sender may not send it
    │   ├── AddressReused      somebody else listens at a rank's address: the rank does not
    │   ├── UnknownKind        a message is of a kind that this release does not know
    │   └── OtherRelease       its release and ours cannot serve together
    ├── StepAbandoned          a lockstep step will not complete in this epoch
    └── DeviceLost             this process can use its accelerator no more

`definitely_not_done` is true if the operation surely had no effect. Only then is a blind retry
safe. A timeout never says so.
"""

from __future__ import annotations


class StarfishError(Exception):
    """Base of all our errors. Its text is one sentence that says what to do next."""

    definitely_not_done = False


class ConfigError(StarfishError):
    definitely_not_done = True


class CheckpointError(StarfishError):
    definitely_not_done = True


class RequestError(StarfishError):
    definitely_not_done = True

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Unauthenticated(StarfishError):
    definitely_not_done = True


class Overloaded(StarfishError):
    """`code` says what is full: "overloaded" for what all clients share, "rate_limit_exceeded" for
    a limit of the client's own."""

    definitely_not_done = True

    def __init__(self, message: str, *, retry_after_s: float, code: str = "overloaded") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.code = code


class Unavailable(StarfishError):
    definitely_not_done = True


class StoreError(StarfishError):
    pass


class StoreUnavailable(StoreError):
    pass


class TxnConflict(StoreError):
    definitely_not_done = True


class LeaseLost(StoreError):
    definitely_not_done = True


class GrammarError(StarfishError):
    definitely_not_done = True


class WireError(StarfishError):
    definitely_not_done = True


class AddressReused(WireError):
    pass


class UnknownKind(WireError):
    pass


class OtherRelease(WireError):
    pass


class StepAbandoned(StarfishError):
    pass


class DeviceLost(StarfishError):
    pass
