"""The only way out of a container that may use the network: an HTTP proxy that listens inside and dials outside.

The container's network namespace has a loopback interface and nothing else. The proxy's listening socket is made in there, so
that it is reachable at 127.0.0.1:3128; the process itself lives on the host's side, as a user who owns nothing. It tunnels
CONNECT and forwards plain requests to the hosts of the policy. It resolves names itself, and refuses every address that is not
public unless a rule names that very address: no rule for a name leads to the host, its neighbours or a metadata service.
A TLS connection whose server name is not allowed is cut, and so are open connections that a new policy does not allow.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from nautile.sandbox import kernel
from nautile.sandbox.errors import InvalidRequest
from nautile.sandbox.policy import NetworkPolicy, Rule, normal_host

__all__ = ["ADDRESS", "ENVIRONMENT", "PolicyProxy", "serve", "server_name"]

ADDRESS = ("127.0.0.1", 3128)
_URL = f"http://{ADDRESS[0]}:{ADDRESS[1]}"
ENVIRONMENT = {name: _URL for one in ("http_proxy", "https_proxy", "all_proxy") for name in (one, one.upper())}
ENVIRONMENT |= {"no_proxy": "localhost,127.0.0.1,::1", "NO_PROXY": "localhost,127.0.0.1,::1"}

_HEADER_LIMIT = 32 * 1024
_RECORD_LIMIT = 5 + 2**14
_PATIENCE = 20.0  # seconds for a header, a name, a connection
_CONNECTIONS = 128
_LOGGED = 1000  # refusals that are written to the log


class RefusedError(Exception):
    """A request that is answered with a status and a reason."""

    def __init__(self, status: str, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


@dataclass(eq=False)
class _Flow:
    """An open connection to one host."""

    host: str
    port: int
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    name: str | None = None  # the TLS server name, if there is one

    def allowed(self, policy: NetworkPolicy) -> bool:
        return policy.allows(self.host, self.port) and (self.name is None or policy.allows(self.name, self.port))

    def cut(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


class PolicyProxy:
    """The proxy of one sandbox."""

    def __init__(self, policy: NetworkPolicy) -> None:
        self.policy = policy
        self.flows: set[_Flow] = set()
        self.refusals = 0

    def change(self, policy: NetworkPolicy) -> int:
        """Use another policy from now on; how many connections that cut."""
        self.policy = policy
        forbidden = [flow for flow in self.flows if not flow.allowed(policy)]
        for flow in forbidden:
            flow.cut()
        return len(forbidden)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client connection, to its end."""
        try:
            if len(self.flows) >= _CONNECTIONS:
                raise RefusedError("503 Service Unavailable", f"more than {_CONNECTIONS} connections")
            async with asyncio.timeout(_PATIENCE):
                lines = await _header(reader)
            await self._request(lines, reader, writer)
        except RefusedError as error:
            self._note(error.why)
            body = f"{error.why}\n".encode("ascii", "replace")
            head = f"HTTP/1.1 {error.status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
            with contextlib.suppress(OSError):
                writer.write(head + body)
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # the other side hung up, or is too slow
        finally:
            writer.close()

    def _note(self, why: str) -> None:
        self.refusals += 1
        if self.refusals <= _LOGGED:
            print(f"proxy refused: {why!a}", file=sys.stderr, flush=True)

    async def _request(self, lines: list[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        words = lines[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            raise RefusedError("400 Bad Request", "not an HTTP/1 request")
        method, target = words[0], words[1].decode("ascii", "replace")
        if method == b"CONNECT":
            flow, upstream = await self._dial(*_endpoint(target, None))
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await self._tunnel(flow, (reader, writer), upstream)
            return
        scheme, _, rest = target.partition("://")
        if scheme.lower() != "http" or not rest:
            raise RefusedError("400 Bad Request", "only CONNECT and http:// requests are served")
        authority, _, path = rest.partition("/")
        host, port = _endpoint(authority, 80)
        length = _body_length(lines)
        flow, upstream = await self._dial(host, port)
        named = (f"[{host}]" if ":" in host else host) + ("" if port == 80 else f":{port}")
        kept = [line for line in lines[1:] if not line.lower().startswith((b"host:", b"connection:", b"proxy-"))]
        first = method + b" /" + path.encode("ascii", "replace") + b" HTTP/1.1"
        head = [first, f"Host: {named}".encode(), *kept, b"Connection: close"]
        upstream[1].write(b"\r\n".join([*head, b"", b""]))
        await self._forward(flow, (reader, writer), upstream, length)

    async def _dial(self, host: str, port: int) -> tuple[_Flow, tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Connect to a host that the policy allows, at an address that it allows. Raises RefusedError."""
        if not self.policy.allows(host, port):
            raise RefusedError("403 Forbidden", f"{host}:{port} is not on this sandbox's list")
        flow = _Flow(host, port)
        self.flows.add(flow)
        try:
            async with asyncio.timeout(_PATIENCE):
                addresses = await self._addresses(host, port)
                reader, writer = await asyncio.open_connection(addresses[0], port)
        except (OSError, TimeoutError) as error:
            self.flows.discard(flow)
            raise RefusedError("502 Bad Gateway", f"{host}:{port} cannot be reached ({error})") from None
        except RefusedError:
            self.flows.discard(flow)
            raise
        flow.writers.append(writer)
        if not flow.allowed(self.policy):  # the policy changed meanwhile
            flow.cut()
            self.flows.discard(flow)
            raise RefusedError("403 Forbidden", f"{host}:{port} is no longer on this sandbox's list")
        return flow, (reader, writer)

    async def _addresses(self, host: str, port: int) -> list[str]:
        with contextlib.suppress(ValueError):  # a literal address: a rule has named it
            return [str(ipaddress.ip_address(host))]
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        public = [str(entry[4][0]) for entry in found if is_public(str(entry[4][0]))]
        if not public:
            raise RefusedError("403 Forbidden", f"{host} has no public address; name the address itself in a rule to allow it")
        return public

    async def _tunnel(
        self,
        flow: _Flow,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        flow.writers.append(client[1])
        try:
            first = await _first_bytes(client[0])
            flow.name = server_name(first)
            if not flow.allowed(self.policy):
                self._note(f"TLS server name {flow.name} through {flow.host}:{flow.port}")
                return
            upstream[1].write(first)
            await asyncio.gather(_copy(client[0], upstream[1]), _copy(upstream[0], client[1]))
        finally:
            self.flows.discard(flow)
            flow.cut()

    async def _forward(
        self,
        flow: _Flow,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        length: int,
    ) -> None:
        """One request's body and its answer; a second request on this connection would escape the check, and is not read."""
        flow.writers.append(client[1])
        try:
            while length and (data := await client[0].read(min(length, 2**16))):
                length -= len(data)
                upstream[1].write(data)
                await upstream[1].drain()
            await _copy(upstream[0], client[1])
            await client[1].drain()
        finally:
            self.flows.discard(flow)
            upstream[1].transport.abort()


def is_public(text: str) -> bool:
    """Whether an address belongs to the public internet, also when it is an IPv4 address in IPv6 clothes."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        hidden = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in ipaddress.ip_network("64:ff9b::/96"):
            hidden = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if hidden is not None:
            return is_public(str(hidden))
    return address.is_global and not address.is_multicast


async def _header(reader: asyncio.StreamReader) -> list[bytes]:
    """The lines of a request's head. Raises RefusedError."""
    try:
        data = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise RefusedError("431 Request Header Fields Too Large", f"more than {_HEADER_LIMIT:,} bytes of header") from None
    if b"\0" in data or any(line.startswith((b" ", b"\t")) or b"\n" in line for line in data.split(b"\r\n")):
        raise RefusedError("400 Bad Request", "the header holds a NUL byte, a bare newline or a folded line")
    return data[:-4].split(b"\r\n")


def _endpoint(text: str, default: int | None) -> tuple[str, int]:
    """(normalised host, port) of ``HOST:PORT``. Raises RefusedError."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(default or "")
    normal = normal_host(host)
    if normal is None or "*" in normal or not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) < 65536:
        raise RefusedError("400 Bad Request", f"{text[:200]} is not HOST:PORT")
    return normal, int(port)


def _body_length(lines: list[bytes]) -> int:
    values = {line.partition(b":")[2].strip() for line in lines[1:] if line.lower().startswith(b"content-length:")}
    if any(line.lower().startswith(b"transfer-encoding:") for line in lines[1:]):
        raise RefusedError("411 Length Required", "a request body needs Content-Length here")
    if len(values) > 1 or any(not value.isdigit() or len(value) > 15 for value in values):
        raise RefusedError("400 Bad Request", "Content-Length is not one number")
    return int(values.pop()) if values else 0


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**16):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()


async def _first_bytes(reader: asyncio.StreamReader) -> bytes:
    """What the client says first; a whole TLS record if it is one."""
    data = await reader.read(2**16)
    while data[:1] == b"\x16" and len(data) < min(5 + int.from_bytes(data[3:5], "big") if len(data) > 4 else 5, _RECORD_LIMIT):
        async with asyncio.timeout(_PATIENCE):
            more = await reader.read(2**16)
        if not more:
            break
        data += more
    return data


def server_name(data: bytes) -> str | None:
    """The server name of a TLS ClientHello (RFC 8446, RFC 6066); None if it has none or ``data`` is something else.

    A name that cannot be read comes back as a string that no rule allows.
    """
    if data[:1] != b"\x16":
        return None
    try:
        return _extension(memoryview(data)[5:])
    except (IndexError, ValueError):
        return "unreadable server name"


def _extension(hello: memoryview) -> str | None:
    def number(at: int, size: int) -> int:
        piece = hello[at : at + size]
        if len(piece) != size:
            raise ValueError
        return int.from_bytes(piece, "big")

    if hello[0] != 1:  # not a ClientHello
        raise ValueError
    at = 4 + 2 + 32
    at += 1 + number(at, 1)  # session id
    at += 2 + number(at, 2)  # cipher suites
    at += 1 + number(at, 1)  # compression
    if at == 4 + number(1, 3):
        return None
    end = at + 2 + number(at, 2)
    at += 2
    while at < end:
        kind, size = number(at, 2), number(at + 2, 2)
        if kind == 0:
            length = number(at + 7, 2)
            name = bytes(hello[at + 9 : at + 9 + length])
            if hello[at + 6] != 0 or len(name) != length:
                raise ValueError
            return name.decode("ascii")
        at += 4 + size
    return None


# -- the process


def serve(pidfd: int, network: int, control: socket.socket, rules: list[str], user: int | None) -> NoReturn:
    """Be the proxy of the container behind ``pidfd`` until that ends. ``network``: our own network namespace.

    ``control`` is a listening Unix socket: a line of rules, separated by spaces, is answered with the number of connections
    that were cut.
    """
    kernel.set_namespaces(pidfd, kernel.CLONE_NEWNET)
    listener = socket.create_server(ADDRESS)
    kernel.set_namespaces(network, kernel.CLONE_NEWNET)
    os.close(network)
    if user is not None:
        kernel.become(user, user)
    asyncio.run(_main(pidfd, listener, control, PolicyProxy(NetworkPolicy(tuple(map(Rule.parse, rules))))))
    os._exit(0)


async def _main(pidfd: int, listener: socket.socket, control: socket.socket, proxy: PolicyProxy) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, ended.set)

    async def change(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            text = (await reader.readline()).decode()
            cut = proxy.change(NetworkPolicy(tuple(map(Rule.parse, text.split()))))
            writer.write(f"{cut}\n".encode())
        except InvalidRequest as error:
            writer.write(f"error {error}\n".encode())
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()

    async with (
        await asyncio.start_server(proxy.handle, sock=listener, limit=_HEADER_LIMIT),
        await asyncio.start_unix_server(change, sock=control),
    ):
        await ended.wait()


def ask(place: Path, rules: list[str]) -> int:
    """Give a running proxy another policy; how many connections that cut. Raises InvalidRequest, OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(20.0)
        channel.connect(str(place))
        channel.sendall((" ".join(rules) + "\n").encode())
        answer = channel.makefile().readline()
    if not answer.strip().isdigit():
        raise InvalidRequest(f"the proxy refused the policy: {answer.strip() or 'it has ended'}")
    return int(answer)
