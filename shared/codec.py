"""Frozen dataclasses to msgpack bytes and back, with validation. The only user of `msgpack`."""

from __future__ import annotations

from typing import Any, TypeVar

import msgpack
import msgspec

from shared.errors import WireError

T = TypeVar("T")


def to_plain(value: object) -> Any:
    """Dataclasses, enums and tuples as plain dicts, values and lists; bytes stay bytes."""
    return msgspec.to_builtins(value, builtin_types=(bytes,))


def from_plain(plain: Any, cls: type[T]) -> T:
    """Raises WireError if `plain` does not have the fields and types of `cls`."""
    try:
        return msgspec.convert(plain, type=cls)
    except msgspec.ValidationError as error:
        raise WireError(f"malformed {cls.__name__}: {error}") from error


def pack_plain(plain: Any) -> bytes:
    packed: bytes = msgpack.packb(plain, use_bin_type=True)
    return packed


def unpack_plain(data: bytes | memoryview) -> Any:
    try:
        return msgpack.unpackb(data, raw=False)
    except (msgpack.UnpackException, ValueError) as error:
        raise WireError(f"not msgpack: {error}") from error


def pack(value: object) -> bytes:
    return pack_plain(to_plain(value))


def unpack(data: bytes | memoryview, cls: type[T]) -> T:
    return from_plain(unpack_plain(data), cls)
