"""A fleet on loopback: three edges and gateways as processes of their own, and what clients see when they are killed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from nautile.sandbox import (
    AccessDenied,
    EdgeGone,
    FileRefused,
    FleetFull,
    InvalidRequest,
    LogFenced,
    QuotaExceeded,
    Sandbox,
    SandboxClosed,
    SandboxLost,
    SubstrateUnavailable,
    TrajectoryDiverged,
    Unsupported,
)
from nautile.sandbox.container import KeeperClient
from nautile.sandbox.fleet.client import Fleet
from nautile.sandbox.fleet.quota import Quota, issue
from nautile.sandbox.fleet.supervisor import Supervisor, node_name
from nautile.sandbox.guest.hosted import hosts_directory
from nautile.sandbox.log import load, verify
from sandbox.conftest import SMALL, arrives_while_it_runs, client_code, need
from sandbox.machines import SMALL as MACHINE
from sandbox.machines import create as create_machine
from waiting import soon

COMMAND = "import sys\nfrom nautile.cli import main\nsys.exit(main(sys.argv[1:]))"


class Process:
    """``nautile sandbox ...``, as an edge or a gateway, which can be killed and started again at the same address."""

    def __init__(self, *arguments, prefix=()):
        self.arguments, self.prefix = list(arguments), prefix
        self.start()

    def start(self):
        self.child = subprocess.Popen(
            [*self.prefix, sys.executable, "-c", client_code(COMMAND), "sandbox", *self.arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        said = self.child.stdout.readline().split()
        assert said[:1] == ["ready"], said
        self.url = said[1]
        self.arguments = [said[1].removeprefix("http://") if one.endswith(":0") else one for one in self.arguments]

    def kill(self):
        self.child.send_signal(signal.SIGKILL)
        self.child.wait()

    def end(self):
        if self.child.poll() is None:
            self.child.terminate()
            assert self.child.wait(90) == 0
        self.child.stdout.close()


class Machines:
    """Three edges, and gateways."""

    def __init__(self, place):
        self.place, self.tokens = place, place / "tokens.json"
        (place / "secret").write_text("a secret of the fleet")
        self.token = issue(self.tokens, "lab/anna", Quota(20))
        self.small = issue(self.tokens, "few", Quota(1))
        common = ["--capacity", "5", "--orphan", "60"]
        self.edges = [self.edge(f"n{number}", *common) for number in range(2)]
        self.edges.append(self.edge("n2", *common, "--secret-file", str(place / "secret"), listen="127.0.0.1:0"))
        self.gateways = [self.gateway()]

    def edge(self, name, *options, listen=None):
        address = listen or f"unix:{self.place}/{name}.sock"
        return Process("edge", name, "--state", str(self.place / name), "--listen", address, *options)

    def gateway(self):
        edges = [option for edge in self.edges for option in ("--edge", edge.url)]
        listen = ["--listen", "127.0.0.1:0", "--secret-file", str(self.place / "secret")]
        return Process("gateway", str(self.tokens), *edges, *listen)

    def create(self, kind="function", token=None, **options):
        gateways = [one.url for one in self.gateways]
        return Sandbox.create(kind, limits=SMALL, fleet=gateways, token=token or self.token, **options)

    def of(self, sandbox):
        return self.edges[int(sandbox.info.id[1])]


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    need("bwrap")
    found = Machines(tmp_path_factory.mktemp("fleet"))
    try:
        yield found
    finally:
        for one in [*found.gateways, *found.edges]:
            one.end()


@pytest.fixture
def fleet(machines):
    """Every edge and one gateway run; what a test leaves is closed."""
    yield machines
    for one in [*machines.gateways, *machines.edges]:
        if one.child.poll() is not None:
            one.start()
    asked = Fleet(machines.gateways[0].url, machines.token)
    seen(asked, 3)
    for one in asked.ask("GET", "/v1/sandboxes")["sandboxes"]:
        asked.ask("DELETE", f"/v1/sandboxes/{one['id']}")


def seen(asked, count, seconds=60.0):
    deadline = time.monotonic() + seconds
    while (found := asked.ask("GET", "/v1/fleet")) and len(found["edges"]) != count:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


def test_the_same_sandbox_through_a_fleet(fleet):
    with fleet.create() as sandbox:
        assert sandbox.info.kind == "function" and sandbox.info.id[:3] in ("n0.", "n1.", "n2.")
        result = sandbox.run(["sh", "-c", "cat; echo err >&2; exit 3"], stdin=b"\xff in")
        assert (result.exit_code, result.stdout_bytes, result.stderr) == (3, b"\xff in", "err\n")
        assert sandbox.python("import sys; print(sys.argv[1:])", ["a b"]).stdout == "['a b']\n"
        assert sandbox.run("sleep 5", timeout=0.2).timed_out
        assert "omitted" in sandbox.run("head -c 300000 /dev/zero").stdout
        with pytest.raises(Unsupported):
            sandbox.read("x")
    with pytest.raises(SandboxClosed):
        sandbox.run("true")


@pytest.mark.usefixtures("crun")
def test_a_container_of_a_fleet_does_everything_but_what_is_said(fleet, tmp_path):
    with fleet.create("container") as sandbox:
        arrives_while_it_runs(sandbox)
        sandbox.write("d/f", b"x" * 100_000, mode=0o600)
        assert sandbox.read("d/f") == b"x" * 100_000 and [one.name for one in sandbox.list("d")] == ["f"]
        with pytest.raises(FileRefused, match="does not exist"):
            sandbox.read("none")
        (tmp_path / "in").mkdir()
        (tmp_path / "in/é\n").write_bytes(b"1")
        sandbox.upload(tmp_path / "in", "/workspace/up")
        sandbox.download("/workspace/up", tmp_path / "out")
        assert (tmp_path / "out/é\n").read_bytes() == b"1"
        child, image = sandbox.fork(), sandbox.snapshot()
        sandbox.run("rm -r d")
        assert child.run("ls").stdout == "d\nup\n"
        with fleet.create("container", image=image) as third:
            assert third.run("ls").stdout == "d\nup\n" and third.info.id[:2] == sandbox.info.id[:2]
        child.close()
        session = sandbox.session()
        session.send("echo $((40+2))\n")
        assert "42" in session.until("42\r\n", 60.0)
        assert session.close() == -1
        sandbox.pause()
        assert sandbox.run("echo on").ok
        assert sandbox.pack_diff(tmp_path / "diff").startswith("sha256:") and (tmp_path / "diff").stat().st_size
        with pytest.raises(Unsupported, match="made without one"):
            sandbox.set_policy(["a:1"])
    with pytest.raises(Unsupported, match="of one machine"):
        fleet.create("container", workspace=tmp_path)
    with pytest.raises(InvalidRequest, match="no image of this name"):
        fleet.create("container", image="../etc")


def test_tokens_projects_and_quotas(fleet):
    with pytest.raises(AccessDenied, match="token"):
        fleet.create(token="wrong")
    with fleet.create() as mine, fleet.create(token=fleet.small) as other:
        with pytest.raises(QuotaExceeded, match="project few has 1 sandboxes of 1"):
            fleet.create(token=fleet.small)
        stranger = Fleet(fleet.gateways[0].url, fleet.small)
        with pytest.raises(AccessDenied, match="another project"):
            stranger.ask("DELETE", f"/v1/sandboxes/{mine.info.id}")
        assert [one["id"] for one in stranger.ask("GET", "/v1/sandboxes")["sandboxes"]] == [other.info.id]
    for _ in range(5):  # what was closed counts no longer, at once
        fleet.create(token=fleet.small).close()


def test_edges_refuse_and_others_are_asked_until_the_fleet_is_full(fleet):
    made = []
    try:
        with pytest.raises(FleetFull, match=r"takes the sandbox.*"):
            while len(made) <= 15:
                made.append(fleet.create())
        assert len(made) == 15 and {one.info.id[:2] for one in made} == {"n0", "n1", "n2"}
        assert all(one.run("true").ok for one in made)
    finally:
        for one in made:
            one.close()


def test_room_that_was_just_made_is_seen(fleet):
    """A gateway looks at its edges once a second; what it saw before the last sandboxes were closed refuses nobody."""
    asked = Fleet(fleet.gateways[0].url, fleet.token)
    filled = [fleet.create() for _ in range(15)]
    soon(lambda: all(edge["live"] == edge["capacity"] for edge in asked.ask("GET", "/v1/fleet")["edges"]))
    for sandbox in filled:
        sandbox.close()
    fleet.create().close()


def test_an_edge_serves_nobody_without_the_secret(fleet):
    url = fleet.edges[2].url
    for headers in ({}, {"x-nautile-secret": "guess"}, {"x-nautile-secret": b"\xff"}, {"x-nautile-project": "lab"}):
        for method, path in (("GET", "/v1/status"), ("GET", "/v1/sandboxes"), ("POST", "/v1/sandboxes")):
            assert httpx.request(method, url + path, headers=headers, trust_env=False).status_code == 403
    assert os.stat(fleet.edges[0].url.removeprefix("unix:")).st_mode & 0o077 == 0


@pytest.mark.parametrize("body", [b"", b"\0" * 8, b"\xff" * 64, b"{}", b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{}tail"])
def test_garbage_gets_an_answer_and_harms_nothing(fleet, body):
    headers = {"authorization": f"Bearer {fleet.token}"}
    base = fleet.gateways[0].url
    with fleet.create() as sandbox:
        for path in ("/v1/sandboxes", f"/v1/sandboxes/{sandbox.info.id}/run", f"/v1/sandboxes/{sandbox.info.id}/fork"):
            answer = httpx.post(base + path, content=body, headers=headers, trust_env=False)
            said = answer.content
            assert b"Traceback" not in said and (answer.status_code >= 400 or b'"error"' in said), (path, said)
        for path in ("/v1/sandboxes/x/run", "/v1/sandboxes/n9.x/run", f"/v1/sandboxes/{sandbox.info.id}/__class__"):
            answer = httpx.post(base + path, content=b"\x02\0\0\0\0\0\0\0{}", headers=headers, trust_env=False)
            assert answer.status_code >= 400 or b'"error"' in answer.content
        assert sandbox.run("true").ok


def count(sandbox):
    return sandbox.run("echo x >> n; sleep 0.05; wc -l < n").stdout.strip()


@pytest.mark.usefixtures("crun")
def test_a_recorded_sandbox_goes_on_whatever_is_killed(fleet):
    sandbox = fleet.create("container", log="runs/1")
    assert count(sandbox) == "1"
    edge = fleet.of(sandbox)
    answers = []
    worker = threading.Thread(target=lambda: answers.append(sandbox.run("sleep 0.5; echo x >> n; wc -l < n").stdout.strip()))
    worker.start()
    time.sleep(0.25)
    edge.kill()  # in the middle of a command
    edge.start()
    worker.join(120)
    assert answers == ["2"]
    fleet.gateways[0].kill()
    fleet.gateways[0].start()
    assert count(sandbox) == "3"
    again = fleet.create("container", log="runs/1")  # another client: from the log first
    assert again.info.id == sandbox.info.id
    assert [count(again), again.run("sleep 0.5; echo x >> n; wc -l < n").stdout.strip(), count(again)] == ["1", "2", "3"]
    assert count(again) == "4"
    with pytest.raises(LogFenced):
        count(sandbox)
    with pytest.raises(TrajectoryDiverged):
        fleet.create("container", log="runs/1").run("other")
    again.close()
    logs = (fleet.place / edge.arguments[1] / "logs").iterdir()  # others of this edge are of other tests
    assert [verify(log) for log in logs if load(log).head["sandbox"] == again.info.id.partition(".")[2]] == [(4, 0)]
    late = fleet.create("container", log="runs/1")
    assert count(late) == "1"
    late.run("sleep 0.5; echo x >> n; wc -l < n")
    count(late)
    count(late)
    with pytest.raises(SandboxLost, match="reexecute"):
        late.read("n")
    assert "reexecute" in late.run("true").infrastructure_error
    late.close()


@pytest.mark.usefixtures("crun")
def test_a_fork_of_a_recorded_sandbox_is_found_again(fleet):
    sandbox = fleet.create("container", log="forked")
    count(sandbox)
    child = sandbox.fork()
    assert count(child) == "2"
    fleet.of(sandbox).kill()
    fleet.of(sandbox).start()
    assert count(child) == "3"
    again = fleet.create("container", log="forked")
    assert count(again) == "1"
    same = again.fork()
    assert same.info.id == child.info.id and [count(same), count(same), count(same)] == ["2", "3", "4"]
    assert count(again) == "2"
    same.close()
    again.close()


@pytest.mark.usefixtures("crun")
def test_a_session_outlives_its_client_and_is_gone_with_its_edge(fleet):
    def talk(sandbox):
        session = sandbox.session(pty=False)
        session.send("x=41; echo o''ne\n")
        assert "one" in session.until("one", 60.0)
        return session

    first = fleet.create("container", log="talk")
    talk(first)
    second = fleet.create("container", log="talk")  # another client, which is given what was typed and read
    session = talk(second)
    session.send("echo $((x+1))\n")  # and goes on in the same shell
    assert "42" in session.until("42", 60.0)
    fleet.of(second).kill()
    fleet.of(second).start()
    with pytest.raises(SandboxLost, match="Open another"):
        session.send("echo\n")
    assert second.run("echo on").stdout == "on\n"
    second.close()


@pytest.mark.usefixtures("crun")
def test_an_edge_that_was_killed_finds_its_sandboxes_and_one_that_ends_leaves_nothing(fleet):
    plain, function = fleet.create("container"), None
    edge = fleet.of(plain)
    plain.write("f", "kept")
    session = plain.session()
    while function is None or fleet.of(function) is not edge:
        function = fleet.create()
    edge.kill()
    error = plain.run("true", timeout=2.0).infrastructure_error
    assert "does not answer" in error
    edge.start()
    assert plain.read("f") == b"kept" and plain.run("true").ok and function.run("true").ok
    with pytest.raises(SandboxLost, match="open another"):
        session.send("x")
    edge.end()
    keeper = KeeperClient()
    inner = plain.info.id.partition(".")[2]
    assert not (keeper.place / inner).exists() and not list((fleet.place / edge.arguments[1] / "sandboxes").iterdir())


@pytest.mark.slow
def test_machines_outlive_their_edge(tmp_path):
    create_machine().close()  # skips where there is no QEMU
    token = issue(tmp_path / "tokens.json", "lab", Quota())
    offers = ["--kind", "microvm", "--emulate", "--orphan", "300"]
    edge = Process("edge", "m0", "--state", str(tmp_path / "m0"), "--listen", f"unix:{tmp_path}/m0.sock", *offers)
    gateway = Process("gateway", str(tmp_path / "tokens.json"), "--edge", edge.url, "--listen", "127.0.0.1:0")
    try:
        fleet = Fleet(gateway.url, token)
        plain = Sandbox.create("microvm", limits=MACHINE, fleet=fleet)
        named = Sandbox.create("microvm", limits=MACHINE, fleet=fleet, log="named")
        assert plain.run("echo kept > f; echo $$ > /tmp/g").ok and count(named) == "1"
        copy = plain.fork()
        edge.kill()
        edge.start()
        assert plain.read("f") == b"kept\n" and copy.run("cat f /tmp/g").ok and count(named) == "2"
        plain.close()
        assert copy.read("f") == b"kept\n"
    finally:
        gateway.end()
        edge.end()
    soon(lambda: not list(hosts_directory().iterdir()))


@pytest.mark.slow
def test_a_silent_edge_is_a_typed_error_and_no_second_trajectory_is_begun(fleet):
    quick = Fleet(fleet.gateways[0].url, fleet.token, patience=0.5)
    for edge in fleet.edges[:1]:
        edge.kill()
    seen(quick, 2)
    with pytest.raises(EdgeGone, match="never begun"):
        Sandbox.create("function", limits=SMALL, fleet=quick, token=None, log="somewhere")
    for _ in range(3):  # others are placed on the edges that answer
        with Sandbox.create("function", limits=SMALL, fleet=quick) as sandbox:
            assert sandbox.info.id[:2] != "n0"
    with pytest.raises(EdgeGone):
        quick.ask("GET", "/v1/sandboxes/n0.f-0")
    with pytest.raises(EdgeGone, match="no edge named n7"):
        quick.ask("GET", "/v1/sandboxes/n7.f-0")


def test_any_gateway_routes_any_sandbox(fleet):
    other = fleet.gateway()
    try:
        with fleet.create() as sandbox:
            elsewhere = Fleet(other.url, fleet.token)
            assert elsewhere.ask("GET", f"/v1/sandboxes/{sandbox.info.id}")["state"] == "live"
            both = Sandbox.create("function", limits=SMALL, fleet=["http://127.0.0.1:9", other.url], token=fleet.token)
            assert both.run("true").ok
            both.close()
    finally:
        other.end()


def test_nobody_there_is_said_in_time():
    began = time.monotonic()
    with pytest.raises(EdgeGone, match="does not answer"):
        Sandbox.create("function", fleet=Fleet("http://127.0.0.1:9", "t", patience=0.3))
    assert time.monotonic() - began < 60  # of the patience that it was given, not of the usual one of a minute and more
    with pytest.raises(InvalidRequest, match="URL of a gateway"):
        Sandbox.create("function", fleet="gateway", token="t")


def test_edges_that_do_not_answer_are_not_full(fleet):
    """A client waits for them as long as it has patience: an edge that is started meanwhile takes the sandbox."""
    lonely = Process("gateway", str(fleet.tokens), "--edge", f"unix:{fleet.place}/late.sock", "--listen", "127.0.0.1:0")
    try:
        with pytest.raises(EdgeGone, match="none of the fleet's 1 edges"):
            Sandbox.create("function", limits=SMALL, fleet=Fleet(lonely.url, fleet.token, patience=0.3))
        asked = Fleet(lonely.url, fleet.token, patience=120.0)
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(Sandbox.create, "function", limits=SMALL, fleet=asked)
            edge = fleet.edge("late", "--capacity", "1")
            try:
                made.result().close()
            finally:
                edge.end()
    finally:
        lonely.end()


def test_many_at_once_through_one_gateway(fleet):
    errors = []

    def work(number):
        try:
            with fleet.create() as sandbox:
                for turn in range(5):
                    assert sandbox.run(f"echo {number} {turn}").stdout == f"{number} {turn}\n"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(120)
    assert not any(one.is_alive() for one in threads) and errors == []


def test_a_client_that_dies_leaves_a_sandbox_that_ends_when_idle(fleet):
    script = (
        "from nautile.sandbox import Sandbox\nimport os\n"
        f"s = Sandbox.create('function', fleet={fleet.gateways[0].url!r}, token={fleet.token!r}, keep=1.0)\n"
        "print(s.info.id, flush=True)\nos.kill(os.getpid(), 9)"
    )
    identity = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=False).stdout.strip()
    asked, deadline = Fleet(fleet.gateways[0].url, fleet.token), time.monotonic() + 60
    with contextlib.suppress(SandboxClosed):
        while asked.ask("GET", f"/v1/sandboxes/{identity}"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    file = Path(fleet.place) / identity[:2] / "sandboxes" / f"{identity[3:]}.json"
    soon(lambda: not file.exists())  # it goes when its sandbox has ended; nobody is given that any more before


def alive(process):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    return False


def test_a_supervisor_starts_its_edge_again_at_the_same_address(tmp_path):
    need("bwrap")
    command = (sys.executable, "-c", client_code(COMMAND), "sandbox", "edge")
    options = ["--state", str(tmp_path / "state"), "--listen", f"unix:{tmp_path}/edge.sock"]
    supervisor = Supervisor("n5", options, interval=0.1, command=command)
    url, first = supervisor.start(), supervisor.process
    try:
        assert url == f"unix:{tmp_path}/edge.sock" and supervisor.answers()
        os.kill(first, signal.SIGKILL)
        soon(lambda: supervisor.restarts > 0 and supervisor.answers())
        assert supervisor.process != first and supervisor.url == url
        with pytest.raises(SubstrateUnavailable, match="did not start"):
            Supervisor("n5", options, command=command).start()  # one edge for one state
        assert supervisor.answers()
        other = Supervisor("n5", [*options, "--evict"], command=command)
        second = supervisor.process
        supervisor.interval = 60.0
        time.sleep(0.2)
        other.start()
        assert other.answers() and not alive(second)
        other.stop()
    finally:
        supervisor.stop()
    assert not supervisor.answers() and not Path(f"/proc/{supervisor.process}").exists()
    broken = Supervisor("N 5", options, command=command)
    with pytest.raises(SubstrateUnavailable, match="did not start"):
        broken.start()
    broken.stop()


@pytest.mark.parametrize(("host", "name"), [("Host-1.example", "host-1-example"), ("ä", None), ("a" * 60, "a" * 40)])
def test_a_machines_name_becomes_an_edges(host, name):
    assert node_name(host) == (name or f"node-{os.getpid()}")


def ip(*words, inside=None):
    into = [] if inside is None else ["nsenter", "-t", str(inside), "-n"]
    subprocess.run([*into, "ip", *words], check=True, capture_output=True)


@pytest.fixture
def host():
    """A network namespace as a machine of its own, on a cable: (its process, its address, our end of the cable)."""
    need("ip")
    if os.geteuid() != 0:
        pytest.skip("only root makes network namespaces with cables")
    number = os.getpid() % 200 + 20
    ours, process = f"nt{number}", subprocess.Popen(["unshare", "-n", "sleep", "300"])
    try:
        soon(lambda: os.readlink(f"/proc/{process.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
        ip("link", "add", ours, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        ip("addr", "add", f"10.213.{number}.1/30", "dev", ours)
        ip("link", "set", ours, "up")
        for words in (("addr", "add", f"10.213.{number}.2/30", "dev", "eth0"), ("link", "set", "eth0", "up")):
            ip(*words, inside=process.pid)
        yield process.pid, f"10.213.{number}.2", ours
    finally:
        process.kill()
        process.wait()
        subprocess.run(["ip", "link", "del", ours], capture_output=True, check=False)


@pytest.mark.slow
def test_a_machine_whose_cable_is_cut_is_noticed_and_found_again(host, tmp_path):
    need("bwrap")
    process, address, cable = host
    (tmp_path / "secret").write_text("a secret of the fleet")
    secret = ["--secret-file", str(tmp_path / "secret")]
    token = issue(tmp_path / "tokens.json", "lab", Quota())
    far = ["edge", "far", "--state", str(tmp_path / "far"), "--listen", f"{address}:7070", *secret]
    edge = Process(*far, prefix=("nsenter", "-t", str(process), "-n"))
    gateway = Process("gateway", str(tmp_path / "tokens.json"), "--edge", edge.url, "--listen", "127.0.0.1:0", *secret)
    try:
        quick = Fleet(gateway.url, token, patience=1.0)
        with Sandbox.create("function", limits=SMALL, fleet=quick) as sandbox:
            assert sandbox.run("echo far").stdout == "far\n"
            ip("link", "set", cable, "down")
            began = time.monotonic()
            assert "does not answer" in sandbox.run("true", timeout=100.0).infrastructure_error
            assert time.monotonic() - began < 25
            ip("link", "set", cable, "up")
            soon(lambda: sandbox.run("true").ok)
    finally:
        gateway.end()
        edge.end()
