"""ServerSettings: where the server listens, who may use it, and its limits."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

from lowtide.models.arguments.names import option
from lowtide.models.errors import BadOption

KEY_VARIABLE = "LOWTIDE_API_KEY"
MAX_VALUES = 16_384
"""Most objects, lists and texts in a body: each takes far more memory than its characters."""
BASE_BYTES = 4 << 20
"""What the first requests load and leave: an estimate, as are the bytes below."""
BYTES_PER_BODY_BYTE, BYTES_PER_VALUE = 10, 120
"""Memory of a body while it is parsed."""
BYTES_PER_CONNECTION = 24 << 10
BYTES_PER_TOKEN = 640
"""Memory of a token that a client has not read yet, with its statistics."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where to listen, and for whom. Raises `BadOption` for a host that others reach where no key is set.

    `allowed_hosts` are names of this server beside the loopback's and `host`, which the header Host may have.
    `cors_origins` are the origins of web pages that may use the server.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 1 << 20
    max_connections: int = 128
    shutdown_seconds: int = 10

    def __post_init__(self) -> None:
        if not self.is_local and not self.api_keys:
            raise BadOption(
                f"{option('host')} is {self.host}, which others can reach: set {option('api_key')} (or "
                f"{KEY_VARIABLE}), or listen on 127.0.0.1"
            )
        if any(not key or not key.isascii() for key in self.api_keys):
            raise BadOption(f"{option('api_key')} is empty or not ASCII: choose another")
        if "*" in self.cors_origins:
            raise BadOption(
                f"{option('cors_origin')} is *, which lets every web page use the model: name the origins, such as "
                "http://localhost:3000"
            )

    def memory_bytes(self, num_tokens: int) -> int:
        """Return what the server takes at most while `num_tokens` tokens of answers wait to be read."""
        reading = BYTES_PER_BODY_BYTE * self.max_body_bytes + MAX_VALUES * BYTES_PER_VALUE
        connections = self.max_connections * BYTES_PER_CONNECTION
        return BASE_BYTES + reading + connections + num_tokens * BYTES_PER_TOKEN

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    def is_own_host(self, name: str) -> bool:
        """Whether a header Host names this server: a page of another site cannot be behind it."""
        bare = without_port(name)
        if bare in self.allowed_hosts or bare == self.host.lower() or is_loopback(bare):
            return True
        return not self.is_local and _is_address(bare)


def keys_of(stated: tuple[str, ...]) -> tuple[str, ...]:
    """Return the keys of the command line, or those of the environment, which are separated by commas."""
    if stated:
        return stated
    return tuple(filter(None, os.environ.get(KEY_VARIABLE, "").split(",")))


def without_port(name: str) -> str:
    """Return the host of `host:port`, in lower case and without the brackets of IPv6."""
    name = name.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0] if name.count(":") == 1 else name


def is_loopback(host: str) -> bool:
    """Whether the host is this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
