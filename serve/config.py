"""`ServeConfig`: how the server listens and whom it lets in. Knows nothing of models or engines."""

import ipaddress
from dataclasses import dataclass, field

from serve.limits import Limits


@dataclass(frozen=True)
class ServeConfig:
    """Settings of one server. `drain_s`: seconds that running requests get after SIGTERM."""

    server_name: str = "127.0.0.1"
    server_port: int = 23333
    model_name: str = ""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_origins: tuple[str, ...] = ()
    drain_s: float = 30.0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.server_port <= 65535:
            raise ValueError(f"server_port is {self.server_port}: expected a number from 0 to 65535.")
        if not self.drain_s >= 0:
            raise ValueError(f"drain_s is {self.drain_s}: expected seconds, 0 or more.")
        if "" in self.api_keys:
            raise ValueError("An API key is empty: expected at least one character for each key.")
        if "*" in self.allow_origins:
            raise ValueError("allow_origins holds '*': name the origins, such as http://localhost:3000.")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.server_name == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.server_name).is_loopback
        except ValueError:
            return False

    @property
    def pending_per_client(self) -> int:
        """Sequences that one client may have pending: half of all, unless it is the only one."""
        if self.limits.pending_per_client is not None:
            return min(self.limits.pending_per_client, self.limits.pending)
        alone = len(self.api_keys) == 1 or (not self.api_keys and self.is_loopback)
        return self.limits.pending if alone else max(1, self.limits.pending // 2)

    @property
    def base_url(self) -> str:
        """Address to show to a user on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.server_name, self.server_name)
        return f"http://[{host}]:{self.server_port}" if ":" in host else f"http://{host}:{self.server_port}"
