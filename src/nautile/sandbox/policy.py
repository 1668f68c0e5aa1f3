"""Which hosts a sandbox may reach: none, or those on a list, through a proxy that is its only way out."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nautile.sandbox.errors import InvalidRequest

__all__ = ["NetworkPolicy", "Rule"]

_LABEL = re.compile(r"^(?!-)[a-z0-9_-]{1,63}(?<!-)$")


@dataclass(frozen=True)
class Rule:
    """One host (``*.`` in front: its subdomains) and one port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Rule:
        """``example.org:443``, ``*.example.org:443``, ``[::1]:80``; without a port 443. Raises InvalidRequest."""
        match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:]+)(?::([0-9]{1,5}))?", text)
        if match is None:
            raise InvalidRequest(f"network rule {text!r}: write HOST:PORT")
        host, port = normal_host(match[1]), int(match[2] or 443)
        if host is None or not 0 < port < 65536:
            raise InvalidRequest(f"network rule {text!r}: write HOST:PORT with an ASCII host (IDN in its xn-- form)")
        return cls(host, port)

    def allows(self, host: str, port: int) -> bool:
        """Whether a normalised host and a port fall under this rule."""
        if port != self.port:
            return False
        return host.endswith(self.host[1:]) if self.host.startswith("*.") else host == self.host


@dataclass(frozen=True)
class NetworkPolicy:
    """``rules`` empty: no network at all."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def of(cls, network: NetworkPolicy | str | list[str] | tuple[str, ...] | None) -> NetworkPolicy:
        """None or "none", a policy, or a list of ``HOST:PORT``. Raises InvalidRequest."""
        if isinstance(network, NetworkPolicy):
            return network
        if network is None or network == "none":
            return cls()
        if isinstance(network, str):
            raise InvalidRequest(f"network {network!r}: give None or a list of HOST:PORT; there is no open network")
        return cls(tuple(map(Rule.parse, network)))

    @property
    def texts(self) -> list[str]:
        """The rules as ``parse`` takes them."""
        return [f"[{rule.host}]:{rule.port}" if ":" in rule.host else f"{rule.host}:{rule.port}" for rule in self.rules]

    def allows(self, host: str, port: int) -> bool:
        """Whether some rule allows a host, as a client wrote it, and a port."""
        normal = normal_host(host)
        return normal is not None and any(rule.allows(normal, port) for rule in self.rules)


def normal_host(host: str) -> str | None:
    """Lower case, without a trailing dot and brackets; None for anything that is no plain ASCII host name or address."""
    text = host.strip("[]") if host.startswith("[") and host.endswith("]") else host
    text = text.lower().removesuffix(".")
    if re.fullmatch(r"[0-9a-f:.]*:[0-9a-f:.]*", text):
        return text
    labels = text.removeprefix("*.").split(".")
    return text if text and len(text) < 254 and all(map(_LABEL.match, labels)) else None
