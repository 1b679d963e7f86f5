"""Who may ask: API keys, and the Host and Origin of requests to a server that listens on this machine only."""

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from convert.errors import InputError
from serve.http.errors import ApiError

# What may stand around a key. Not str.strip(): the bytes of a header are read as Latin-1, in which the last byte of a letter such
# as "à" is a no-break space.
_BLANKS = " \t\r"
OPEN_PATHS = frozenset({"/", "/health"})  # answered without a key


def read_keys(path: Path) -> tuple[str, ...]:
    """Keys of a file, one per line; empty lines and lines that begin with # do not count. Raises InputError."""
    try:
        lines = [line.strip(_BLANKS) for line in path.read_bytes().decode().split("\n")]
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
        raise InputError(
            f"The key file {path} cannot be read: {reason}. Expected a text file with one key per line."
        ) from e
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise InputError(f"The key file {path} holds no key: expected one per line.")
    return keys


class KeyCheck:
    """Compares a key with all known ones in a time that depends on neither."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @property
    def is_on(self) -> bool:
        return bool(self._digests)

    def client(self, authorization: str) -> str:
        """A name for the holder of the key in an Authorization header (latin-1 text), or 401."""
        scheme, _, key = authorization.partition(" ")
        offered = hashlib.sha256(key.strip(_BLANKS).encode("latin-1")).digest()
        matches = [hmac.compare_digest(offered, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "A valid API key is needed: send the header 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return f"key-{matches.index(True)}"


def _is_local(netloc: str) -> bool:
    try:
        name = urlsplit(f"//{netloc}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_origin(headers: Headers, loopback: bool, allowed: Iterable[str]) -> None:
    """403 for a Host that is not this machine (DNS rebinding), or an Origin that is another site, where bound to loopback."""
    if not loopback:
        return
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not _is_local(hosts[0]):
        raise ApiError(
            403,
            "The Host header must name this machine (127.0.0.1, localhost or [::1]): the server listens on loopback.",
            code="host_refused",
        )
    for origin in headers.getlist("origin"):
        if origin not in allowed and origin != f"http://{hosts[0]}":
            raise ApiError(
                403,
                "Requests of this origin are not allowed: name it with --allow-origin.",
                code="origin_refused",
            )
