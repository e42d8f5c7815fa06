"""API keys."""

from __future__ import annotations

import hmac
from pathlib import Path

from rushhour.errors import ServeError


class Keys:
    """The API keys that are accepted. An empty set accepts every request.

    Args:
        keys: as clients send them: `Authorization: Bearer KEY`.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    @classmethod
    def read(cls, file: Path) -> tuple[str, ...]:
        """The keys in a file, one a line; empty lines and lines that begin with # are ignored.

        Raises:
            ServeError: if the file cannot be read, or holds no key of 16 characters or more.
        """
        try:
            lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(f"cannot read the API keys in {file}", str(error), "check the path") from error
        keys = tuple(line for line in lines if line and not line.startswith("#"))
        if not keys or any(len(key) < 16 or not key.isascii() for key in keys):
            raise ServeError(
                f"the API keys in {file} cannot be used",
                "the file needs at least one key, and each key has 16 or more ASCII characters",
                "make one with: python3 -c 'import secrets; print(secrets.token_urlsafe())'",
            )
        return keys

    def renew(self, keys: tuple[str, ...]) -> None:
        """Accept these keys from now on, and no others."""
        self._keys = tuple(key.encode() for key in keys)

    def admit(self, authorization: bytes | None) -> bool:
        """Whether this `Authorization` field carries one of the keys; takes the same time for any wrong key."""
        if not self._keys:
            return True
        scheme, _, key = (authorization or b"").partition(b" ")
        matches = [hmac.compare_digest(known, key.strip()) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)
