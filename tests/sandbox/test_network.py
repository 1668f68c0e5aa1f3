"""An allowlist that cannot be passed by: what is on it works, what is not does not, and a change holds at once."""

import contextlib
import functools
import http.server
import socket
import ssl
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.sandbox import InvalidRequest, Sandbox, Unsupported
from nautile.sandbox.proxy import is_public, server_name
from sandbox.conftest import SMALL


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{self.path} {self.headers['Host']}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body[::-1])

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def web():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def echo():
    """A server that sends back what it gets, one connection a thread."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=copy, args=(connection,), daemon=True).start()

        def copy(connection):
            with contextlib.suppress(OSError), connection:
                while data := connection.recv(4096):
                    connection.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def servers():
    with web() as allowed, web() as forbidden, echo() as repeat:
        yield allowed, forbidden, repeat


@pytest.fixture(scope="module")
def online(crun, servers):
    allowed, _, repeat = servers
    with Sandbox.create("container", limits=SMALL, network=[f"127.0.0.1:{allowed}", f"127.0.0.1:{repeat}"]) as sandbox:
        yield sandbox


GET = """
import sys, urllib.request, urllib.error
proxy = urllib.request.ProxyHandler({'http': 'http://127.0.0.1:3128'})
opener = urllib.request.build_opener(proxy)
try:
    print(opener.open(sys.argv[1], timeout=60, data=sys.argv[2].encode() if sys.argv[2:] else None).read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode().strip())
except OSError as error:
    print('failed', error)
"""

RAW = """
import contextlib, socket, sys
with socket.create_connection(('127.0.0.1', 3128), 60) as client:
    with contextlib.suppress(OSError):  # it may be refused before all of it has been said
        client.sendall(eval(sys.argv[1]))
    data, more, enough = b'', eval(sys.argv[2]) if len(sys.argv) > 2 else b'', 4096
    try:
        while len(data) < enough and (piece := client.recv(4096)):  # to its end, or until what was sent has come back
            data += piece
            if more and data.endswith(b'\\r\\n\\r\\n'):
                client.sendall(more)
                more, enough = b'', len(data) + len(more)
    except OSError as error:
        print(type(error).__name__)
    print(data.decode('latin-1'))
"""


def get(sandbox, *arguments):
    """Through the proxy, though the host is called 127.0.0.1, which clients take for their own."""
    return sandbox.run(["python3", "-I", "-c", GET, *arguments], 90, env={"no_proxy": "", "NO_PROXY": ""})


def test_a_host_on_the_list_can_be_reached(online, servers):
    allowed, _, _ = servers
    assert get(online, f"http://127.0.0.1:{allowed}/a?b=c").stdout == f"/a?b=c 127.0.0.1:{allowed}\n"
    assert get(online, f"http://127.0.0.1:{allowed}/", "abc").stdout == "cba\n"
    assert "http://127.0.0.1:3128" in online.run("env | grep -i http_proxy").stdout


def test_a_host_that_is_not_on_the_list_cannot(online, servers):
    allowed, forbidden, _ = servers
    for url in (
        f"http://127.0.0.1:{forbidden}/",
        f"http://localhost:{allowed}/",
        "http://169.254.169.254/",
        "http://example.org/",
    ):
        assert get(online, url).stdout.startswith("403 "), url


def test_the_proxy_cannot_be_passed_by(online, servers):
    allowed, _, _ = servers
    source = f"""
import socket
targets = (socket.AF_INET, ('127.0.0.1', {allowed})), (socket.AF_INET, ('1.1.1.1', 443)), (socket.AF_INET6, ('::1', {allowed}))
for family, address in targets:
    with socket.socket(family) as client:
        client.settimeout(3)
        try:
            client.connect(address)
            print('connected', address)
        except OSError as error:
            pass
"""
    assert online.python(source).stdout == ""
    assert online.run("sed 1,2d /proc/net/dev | cut -d: -f1").stdout.split() == ["lo"]


REQUESTS = [
    "b'CONNECT 127.0.0.1:{forbidden} HTTP/1.1\\r\\n\\r\\n'",
    "b'CONNECT 127.0.0.1:{allowed}\\0.evil.com HTTP/1.1\\r\\n\\r\\n'",
    "b'CONNECT 127.0.0.1%00:{allowed} HTTP/1.1\\r\\n\\r\\n'",
    "b'CONNECT 127.1:{allowed} HTTP/1.1\\r\\n\\r\\n'",
    "b'CONNECT 2130706433:{allowed} HTTP/1.1\\r\\n\\r\\n'",
    "b'CONNECT [::ffff:127.0.0.1]:{allowed} HTTP/1.1\\r\\n\\r\\n'",
    "b'CONNECT 127.0.0.1:{allowed}:80 HTTP/1.1\\r\\n\\r\\n'",
    "b'CONNECT *:{allowed} HTTP/1.1\\r\\n\\r\\n'",
    "b'GET http://127.0.0.1:{allowed}@127.0.0.1:{forbidden}/ HTTP/1.1\\r\\n\\r\\n'",
    "b'GET http://127.0.0.1:{forbidden}/ HTTP/1.1\\r\\nHost: 127.0.0.1:{allowed}\\r\\n\\r\\n'",
    "b'GET / HTTP/1.1\\r\\nHost: 127.0.0.1:{allowed}\\r\\n\\r\\n'",
    "b'GET ftp://127.0.0.1:{allowed}/ HTTP/1.1\\r\\n\\r\\n'",
    "b'GET http://127.0.0.1:{allowed}/ HTTP/1.1\\r\\nX: a\\n\\nGET / HTTP/1.1\\r\\n\\r\\n'",
    "b'POST http://127.0.0.1:{allowed}/ HTTP/1.1\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n'",
    "b'POST http://127.0.0.1:{allowed}/ HTTP/1.1\\r\\nContent-Length: 1\\r\\nContent-Length: 2\\r\\n\\r\\nab'",
    "b'\\x05\\x01\\x00' + b'\\r\\n\\r\\n'",
    "b'A' * 100000",
]


@pytest.mark.parametrize("request_text", REQUESTS)
def test_odd_requests_are_refused(online, servers, request_text):
    allowed, forbidden, _ = servers
    result = online.python(RAW, [request_text.format(allowed=allowed, forbidden=forbidden)], timeout=90)
    assert " 200 " not in result.stdout and "HTTP/1.1 4" in result.stdout


def test_a_second_request_on_one_connection_is_not_forwarded(online, servers):
    allowed, _, _ = servers
    one = f"GET http://127.0.0.1:{allowed}/one HTTP/1.1\\r\\n\\r\\n"
    two = "GET /two HTTP/1.1\\r\\nHost: hidden\\r\\n\\r\\n"
    result = online.python(RAW, [f"b'{one}{two}'"], timeout=90)
    assert "/one 127.0.0.1" in result.stdout and "two" not in result.stdout


@pytest.fixture
def reaching(crun):
    """Make a sandbox that may reach some hosts."""
    return lambda network: Sandbox.create("container", limits=SMALL, network=network)


def test_a_tunnel_carries_bytes_and_a_change_of_policy_cuts_it(reaching, servers):
    allowed, _, repeat = servers
    with reaching([f"127.0.0.1:{repeat}"]) as sandbox:
        source = f"""
import socket, time
client = socket.create_connection(('127.0.0.1', 3128), 60)
client.sendall(b'CONNECT 127.0.0.1:{repeat} HTTP/1.1\\r\\n\\r\\n')
assert b' 200 ' in client.recv(4096)
client.sendall(b'there and back')
print(client.recv(100).decode(), flush=True)
client.settimeout(100)
try:
    print('left', client.recv(100), 'done', flush=True)
except TimeoutError:
    print('it was not ended', flush=True)
except OSError:
    print('cut done', flush=True)
"""
        session = sandbox.session(["python3", "-c", source], pty=False)
        assert session.until("there and back", 60.0)
        sandbox.set_policy([f"127.0.0.1:{allowed}"])
        end = session.until("done", 60.0)
        assert "cut" in end or "left b''" in end
        session.close()
        assert get(sandbox, f"http://127.0.0.1:{allowed}/x").stdout.startswith("/x ")
        assert "403" in sandbox.python(RAW, [f"b'CONNECT 127.0.0.1:{repeat} HTTP/1.1\\r\\n\\r\\n'"], timeout=90).stdout
        sandbox.set_policy(None)
        assert get(sandbox, f"http://127.0.0.1:{allowed}/x").stdout.startswith("403 ")


def test_a_server_name_that_is_not_allowed_is_cut(online, servers):
    _, _, repeat = servers
    hello = client_hello("evil.example.com")
    result = online.python(RAW, [f"b'CONNECT 127.0.0.1:{repeat} HTTP/1.1\\r\\n\\r\\n'", repr(hello)], timeout=90)
    assert " 200 " in result.stdout and "evil" not in result.stdout  # the echo server never got it
    unnamed = client_hello(None)
    plain = online.python(RAW, [f"b'CONNECT 127.0.0.1:{repeat} HTTP/1.1\\r\\n\\r\\n'", repr(unnamed)], timeout=90)
    assert len(plain.stdout) >= len(unnamed) > 150


def test_a_container_without_a_network_cannot_be_given_one(container):
    with pytest.raises(Unsupported, match="made without one"):
        container.set_policy(["example.org:443"])
    with pytest.raises(InvalidRequest):
        Sandbox.create("container", network="public")


# -- the parts


@functools.cache
def client_hello(name):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("name", ["example.org", "a" * 60 + ".example.org", None])
def test_the_server_name_is_found(name):
    assert server_name(client_hello(name)) == name


@settings(max_examples=300)
@given(st.integers(0, 600), st.integers(0, 255), st.integers(0, 600))
def test_a_broken_hello_never_gives_another_name_silently(at, byte, cut):
    hello = bytearray(client_hello("example.org"))
    hello[at % len(hello)] = byte
    found = server_name(bytes(hello[: len(hello) - cut]))
    assert found is None or isinstance(found, str)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_no_bytes_break_the_parser(data):
    server_name(data)
    server_name(b"\x16\x03\x01" + data)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((one, True) for one in ("1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1")),
        *((one, False) for one in ("127.0.0.1", "10.1.2.3", "192.168.1.1", "169.254.169.254", "100.64.0.1")),
        *((one, False) for one in ("0.0.0.0", "224.0.0.1")),
        *((one, False) for one in ("::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::")),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) is public
