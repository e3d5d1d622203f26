"""Makes the users and roles of an instance in etcd, and turns its authentication on. What is there
already stays, so it can be repeated at any time."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shared.errors import StoreError
from shared.etcd_client import EtcdClient, prefix_end, rpc
from shared.etcd_options import EtcdOptions
from shared.etcd_permissions import ROOT, Account, KeyRange

# etcd3 exports the messages that use it, but not the message itself.
_Permission: Any = rpc.AuthRoleGrantPermissionRequest().perm.__class__
_TIMEOUT_S = 10.0
"""etcd takes a tenth of a second for a password, one after the other."""
_THERE_ALREADY = "already exists"
_NOT_WITH_THIS_PASSWORD = ("authentication failed", "authentication is not enabled")


class EtcdAdmin:
    """Acts as root, or, while authentication is off, as anybody. Every method raises StoreError."""

    def __init__(self, options: EtcdOptions) -> None:
        """Raises ConfigError."""
        self._client = EtcdClient(options, _TIMEOUT_S)
        self._auth: Any = rpc.AuthStub(self._client.channel)

    def close(self) -> None:
        self._client.close()

    async def set_up(
        self,
        accounts: Iterable[Account],
        passwords: Mapping[str, str],
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Afterwards each account has its role with exactly its permissions. A user without an
        entry in `passwords` can be reached by a certificate alone."""
        roles = set((await self._call(self._auth.RoleList, rpc.AuthRoleListRequest())).roles)
        users = set((await self._call(self._auth.UserList, rpc.AuthUserListRequest())).users)
        for account in accounts:
            on_progress(account.name)
            if account.name not in roles:
                await self._make(self._auth.RoleAdd, rpc.AuthRoleAddRequest(name=account.name))
            await self._set_permissions(account, is_new=account.name not in roles)
            await self._set_user(account.name, passwords.get(account.name), account.name in users)

    async def enable(self, root_password: str | None = None) -> None:
        """From now on etcd asks everybody who they are. Does nothing if it does so already."""
        roles = (await self._call(self._auth.RoleList, rpc.AuthRoleListRequest())).roles
        if ROOT not in roles:
            await self._make(self._auth.RoleAdd, rpc.AuthRoleAddRequest(name=ROOT))
        users = (await self._call(self._auth.UserList, rpc.AuthUserListRequest())).users
        await self._set_user(ROOT, root_password, ROOT in users)
        await self._call(self._auth.AuthEnable, rpc.AuthEnableRequest())

    async def _set_permissions(self, account: Account, *, is_new: bool) -> None:
        found: set[KeyRange] = set()
        if not is_new:
            request = rpc.AuthRoleGetRequest(role=account.name)
            reply = await self._call(self._auth.RoleGet, request)
            found = {_key_range(permission) for permission in reply.perm}
        for kept in sorted(found - account.permissions):
            if kept.key not in {wanted.key for wanted in account.permissions}:
                await self._call(self._auth.RoleRevokePermission, _revocation(account.name, kept))
        for wanted in sorted(account.permissions - found):
            await self._call(
                self._auth.RoleGrantPermission,
                rpc.AuthRoleGrantPermissionRequest(name=account.name, perm=_permission(wanted)),
            )

    async def _set_user(self, name: str, password: str | None, exists: bool) -> None:
        """With the role of the same name."""
        if not exists:
            nobody_knows = secrets.token_hex(32)
            request = rpc.AuthUserAddRequest(name=name, password=password or nobody_knows)
            await self._make(self._auth.UserAdd, request)
        elif password is not None and not await self._has_password(name, password):
            change = rpc.AuthUserChangePasswordRequest(name=name, password=password)
            await self._call(self._auth.UserChangePassword, change)
        user = await self._call(self._auth.UserGet, rpc.AuthUserGetRequest(name=name))
        if name not in user.roles:
            grant = rpc.AuthUserGrantRoleRequest(user=name, role=name)
            await self._make(self._auth.UserGrantRole, grant)

    async def _has_password(self, name: str, password: str) -> bool:
        request = rpc.AuthenticateRequest(name=name, password=password)
        try:
            await self._call(self._auth.Authenticate, request)
        except StoreError as error:
            if any(text in str(error) for text in _NOT_WITH_THIS_PASSWORD):
                return False
            raise
        return True

    async def _make(self, method: Any, request: Any) -> None:
        try:
            await self._call(method, request)
        except StoreError as error:
            if _THERE_ALREADY not in str(error):
                raise

    async def _call(self, method: Any, request: Any) -> Any:
        return await self._client.call(method, request)


def _permission(wanted: KeyRange) -> Any:
    kind = _Permission.READWRITE if wanted.writable else _Permission.READ
    end = prefix_end(wanted.key) if wanted.key.endswith("/") else b""
    return _Permission(permType=kind, key=wanted.key.encode(), range_end=end)


def _key_range(permission: Any) -> KeyRange:
    return KeyRange(
        key=permission.key.decode(errors="replace"),
        writable=permission.permType != _Permission.READ,
    )


def _revocation(role: str, unwanted: KeyRange) -> Any:
    end = prefix_end(unwanted.key).decode() if unwanted.key.endswith("/") else ""
    return rpc.AuthRoleRevokePermissionRequest(role=role, key=unwanted.key, range_end=end)
