"""The fleet's parts by themselves: frames, placement, quotas, what an edge owns and when it ends."""

import asyncio
import collections
import dataclasses
import fcntl
import json
import os
import random
import subprocess
import sys
import threading
import time

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nautile.sandbox import (
    AccessDenied,
    Capabilities,
    EdgeGone,
    FileRefused,
    FleetFull,
    Info,
    InvalidRequest,
    Limits,
    QuotaExceeded,
    RunResult,
    Sandbox,
    SandboxClosed,
    SandboxError,
    SandboxLost,
    TrajectoryDiverged,
    Unsupported,
    cgroup,
)
from nautile.sandbox.driver import Order
from nautile.sandbox.fleet import serving, wire
from nautile.sandbox.fleet.admission import Admission
from nautile.sandbox.fleet.client import FleetDriver
from nautile.sandbox.fleet.edge import Edge, EdgeConfig, Wish
from nautile.sandbox.fleet.placement import EdgeView, by_name, order
from nautile.sandbox.fleet.quota import Book, Ledger, Quota, belongs, issue
from nautile.sandbox.fleet.supervisor import Supervisor
from nautile.sandbox.fleet.watcher import Edges, Watcher
from nautile.sandbox.records import error_record, rebuilt
from waiting import soon

# -- the wire


HEADERS = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4)


@given(sent=st.lists(st.tuples(HEADERS, st.binary(max_size=300)), max_size=5), sizes=st.lists(st.integers(1, 50), min_size=1))
def test_frames_come_out_whole_however_they_are_cut(sent, sizes):
    data = b"".join(wire.pack(*one) for one in sent)
    parser, got, at = wire.Frames(), [], 0
    while at < len(data):
        size = sizes[at % len(sizes)]
        got += parser.feed(data[at : at + size])
        at += size
    assert got == sent and parser.whole


@settings(max_examples=300)
@given(data=st.binary(max_size=60))
def test_what_is_no_frame_is_refused_and_never_read_beyond_its_limits(data):
    try:
        header, body = wire.one_frame(data)
    except InvalidRequest:
        return
    assert wire.pack(header, body)[4:8] == data[4:8]


@pytest.mark.parametrize("lengths", [(2**31, 0), (0, 2**31), (2**32 - 1, 2**32 - 1)])
def test_announced_lengths_are_checked_before_anything_is_kept(lengths):
    with pytest.raises(InvalidRequest, match="was announced"):
        list(wire.Frames().feed(lengths[0].to_bytes(4, "little") + lengths[1].to_bytes(4, "little")))


@pytest.mark.parametrize(
    "error",
    [FileRefused("/x", "a link"), TrajectoryDiverged(3, "a", "b"), Unsupported("function", "x", "y", "z"), FleetFull("full")],
)
def test_errors_keep_their_class_text_and_fields(error):
    again = rebuilt(json.loads(json.dumps(error_record(error))))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)


@pytest.mark.parametrize("name", ["SystemExit", "__all__", "annotations", None, 7, "OSError"])
def test_a_name_that_is_no_sandbox_error_is_a_plain_one(name):
    assert type(rebuilt({"error": name, "text": "t", "fields": [1]})) is SandboxError


@pytest.mark.parametrize("text", ["", "n1", ".x", "n1.", "N1.x", "a/b.c", "../x.y", "a" * 41 + ".x"])
def test_ids_without_an_edge_are_refused(text):
    with pytest.raises(InvalidRequest, match="no id"):
        wire.edge_of(text)
    assert wire.edge_of("n-1.c-0a") == "n-1"


# -- placement


def view(name, live=0, capacity=100, kinds=("function",), accepting=True, usage=None):
    return EdgeView(name, f"http://{name}", live, capacity, kinds, accepting, usage or {}, 0)


VIEWS = st.lists(
    st.builds(
        view,
        st.sampled_from("abcdefgh"),
        st.integers(0, 5),
        st.integers(0, 5),
        st.sampled_from([("function",), ("container",)]),
        st.booleans(),
    ),
    unique_by=lambda one: one.name,
)


@given(views=VIEWS, choices=st.integers(1, 4), seed=st.integers(0, 99))
def test_only_edges_that_may_take_it_are_asked_and_all_of_them(views, choices, seed):
    found = order(views, "function", choices, random.Random(seed))
    able = {one.name for one in views if one.accepting and one.live < one.capacity and "function" in one.kinds}
    assert sorted(one.name for one in found) == sorted(able)
    first = found[:choices]
    assert first == sorted(first, key=lambda one: one.load)


def test_two_choices_spread_far_better_than_one():
    def most(choices):
        chance, counts = random.Random(1), collections.Counter({name: 0 for name in map(str, range(50))})
        for _ in range(5000):
            views = [view(name, live, 10**6) for name, live in counts.items()]
            counts[order(views, "function", choices, chance)[0].name] += 1
        return max(counts.values()) - 100

    assert most(2) <= 5 < most(1)


@given(views=VIEWS, name=st.text(max_size=5))
def test_a_name_always_asks_the_same_edge_first_and_a_lost_edge_moves_only_its_own(views, name):
    first = by_name(views, "function", name)
    assert by_name(views[::-1], "function", name) == first
    without = [one for one in views if one not in first[:1]]
    assert by_name(without, "function", name) == first[1:]


# -- tokens and quotas


def test_tokens_are_kept_as_hashes_and_name_their_project(tmp_path):
    file = tmp_path / "tokens.json"
    token = issue(file, "lab/anna", Quota(3))
    other = issue(file, "lab", Quota(memory=2**30))
    assert token not in file.read_text() and file.stat().st_mode & 0o077 == 0
    book = Book.load(file)
    assert book.project_of(f"Bearer {token}") == "lab/anna" and book.project_of(f"bearer {other}") == "lab"
    for wrong in (None, "", "Bearer", "Bearer x", f"Basic {token}", f"Bearer {token}x", "Bearer \udcff"):
        with pytest.raises(AccessDenied):
            book.project_of(wrong)
    assert book.projects == {"lab/anna": Quota(3), "lab": Quota(None, 2**30)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"projects": {}, "tokens": {"x": "nobody"}}',
        '{"projects": {"a": {"b": 1}}, "tokens": {}}',
        '{"projects": {"A B": {}}, "tokens": {}}',
        '{"projects": {"a": {"sandboxes": -1}}, "tokens": {}}',
    ],
)
def test_a_wrong_file_says_so(tmp_path, text):
    (tmp_path / "t").write_text(text)
    with pytest.raises(InvalidRequest):
        Book.load(tmp_path / "t")
    with pytest.raises(InvalidRequest, match="is missing"):
        Book.load(tmp_path / "none")
    with pytest.raises(InvalidRequest, match="steps"):
        issue(tmp_path / "new", "../x", Quota())


def test_limits_of_every_level_hold():
    book = Book({"a": Quota(3, 100), "a/b": Quota(2), "ab": Quota(0)}, {})
    book.admit("a/b/c", 10, {"a/b": (1, 10), "a/x": (1, 10), "ab": (9, 900)})
    with pytest.raises(QuotaExceeded, match="project a/b has 2 sandboxes of 2"):
        book.admit("a/b/c", 10, {"a/b/c": (1, 10), "a/b": (1, 10)})
    with pytest.raises(QuotaExceeded, match="project a has 3"):
        book.admit("a/z", 10, {"a/b": (2, 10), "a": (1, 10)})
    with pytest.raises(QuotaExceeded, match="more do not fit"):
        book.admit("a/z", 91, {"a": (1, 10)})
    with pytest.raises(QuotaExceeded):
        book.admit("ab", 1, {})
    assert belongs("a/b", "a") and belongs("a", "a") and not belongs("ab", "a") and not belongs("a", "a/b")


class Books(RuleBasedStateMachine):
    """One gateway, edges that number their changes, answers of any age: the ledger never counts too few, and settles to it."""

    def __init__(self):
        super().__init__()
        self.ledger, self.change, self.live, self.seen, self.open = Ledger(), {"x": 0, "y": 0}, {"x": [], "y": []}, {}, []

    def truth(self):
        return sum(map(len, self.live.values()))

    @rule()
    def begin(self):
        self.open.append(self.ledger.reserve("p", 5))

    @rule(edge=st.sampled_from("xy"), told=st.booleans())
    def make(self, edge, told):
        if self.open:
            self.change[edge] += 1
            self.live[edge].append(self.change[edge])
            if told:
                self.ledger.settle(self.open.pop(), edge, self.change[edge])
            else:  # the answer was lost; the edge has it
                self.ledger.settle(self.open.pop())
                self.answer(edge, 0)

    @rule()
    def fail(self):
        if self.open:
            self.ledger.settle(self.open.pop())

    @rule(edge=st.sampled_from("xy"))
    def close(self, edge):
        if self.live[edge]:
            self.live[edge].pop()
            self.change[edge] += 1
            self.ledger.closed(edge, "p", 5, self.change[edge])

    @rule(edge=st.sampled_from("xy"), delay=st.just(0))
    def answer(self, edge, delay):
        self.seen[edge] = {"p": (len(self.live[edge]), 5 * len(self.live[edge]))}
        self.ledger.answered(edge, self.change[edge])

    @invariant()
    def exact(self):
        count, memory = self.ledger.usage(self.seen).get("p", (0, 0))
        assert count == self.truth() + len(self.open) and memory == 5 * count


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=30)


# -- an edge, without HTTP and without real sandboxes


class Fake:
    """A driver that needs nothing."""

    made = 0

    def __init__(self):
        Fake.made += 1
        self.info = Info(f"f-{Fake.made:04}", "function", "fake", "native", ())
        self.capabilities = Capabilities(*[False] * 7)
        self.closed = False

    def reason(self, feature):
        return "it is fake", "none"

    def run(self, order, watch):
        return RunResult(0, " ".join(order.argv), "", False, False, None)

    def close(self):
        self.closed = True


@pytest.fixture
def make_edge(tmp_path, monkeypatch):
    edges = []
    monkeypatch.setattr(Sandbox, "create", classmethod(lambda cls, kind, **options: cls(Fake(), options["limits"])))

    def make(**options):
        edges.append(Edge(EdgeConfig("n1", tmp_path / "state", **options)))
        return edges[-1]

    yield make
    for one in edges:
        one.stop(leave=False)


def wished(edge, project="p", **request):
    return Wish.of(project, {"kind": "function", **request}, edge.config)


def test_an_edge_refuses_what_is_too_much_and_counts_what_is_being_made(make_edge):
    edge = make_edge(admission=Admission(capacity=2, reserve=0.0))
    made = [edge.create(wished(edge))["id"] for _ in range(2)]
    with pytest.raises(FleetFull, match="2 sandboxes, as many as it may"):
        edge.create(wished(edge))
    assert edge.status()["usage"] == {"p": [2, 2 * Limits().memory]} and not edge.status()["accepting"]
    before = edge.change
    assert edge.close(made[0], "p")["closed"] and edge.change == before + 1
    assert not edge.close(made[0], "p")["closed"]
    edge.create(wished(edge))
    edge.draining = True
    with pytest.raises(FleetFull, match="about to stop"):
        edge.create(wished(edge))


@pytest.mark.parametrize("recorded", [False, True])
def test_a_command_of_a_fleet_that_is_silent_is_a_result_unless_it_can_be_asked_for_again(recorded):
    """In a trajectory it has its place: as a result, the next command would be taken for it."""

    class Silent:
        def operate(self, *_):
            raise EdgeGone("nobody answers")

    made = {"id": "n0.c-1", "kind": "container", "info": None, "capabilities": None, "client": 1 if recorded else None}
    driver = FleetDriver(Silent(), made)
    command = Order(("true",), b"", 1.0, None, {})
    if recorded:
        with pytest.raises(EdgeGone):
            driver.run(command, None)
    else:
        assert driver.run(command, None).infrastructure_error == "fleet: nobody answers"


@pytest.mark.parametrize("runs", [False, True])
def test_the_lock_of_an_edge_that_was_killed_is_waited_for(tmp_path, runs):
    """A child that a killed edge has just forked holds its lock for a moment longer; an edge that runs keeps it."""
    held = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(held, fcntl.LOCK_EX)
    os.write(held, cgroup.owner_name().encode() if runs else b"1.1")
    if runs:
        with pytest.raises(InvalidRequest, match=f"an edge that runs .process {os.getpid()}"):
            serving._take(tmp_path, evict=False)
        os.close(held)
        return
    threading.Timer(0.1, os.close, [held]).start()
    taken = serving._take(tmp_path, evict=False)
    assert os.pread(taken, 100, 0).decode() == cgroup.owner_name()
    os.close(taken)


def test_limits_are_measured_by_the_machine_that_makes_the_sandbox(make_edge, monkeypatch):
    """A client and its gateway may have less memory than the edge: only the edge, which has it, says no."""
    edge = make_edge(admission=Admission(reserve=0.0))
    limits = dataclasses.asdict(Limits(memory=2**50))  # nothing is asked of the machine that this runs on
    assert wire.limits_of({"limits": limits}).memory == 2**50
    with pytest.raises(InvalidRequest, match=r"memory is .* the machine has"):
        wished(edge, limits=limits)
    pages = os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(
        os, "sysconf", lambda name: 2**40 if name == "SC_PHYS_PAGES" else 4096 if name == "SC_PAGE_SIZE" else pages
    )
    assert edge.create(wished(edge, limits=limits))["memory"] == 2**50


def test_admission_looks_at_the_machine(tmp_path):
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "self/fd").mkdir(parents=True)

    def says(available=900, processes=10):
        (tmp_path / "meminfo").write_text(f"MemTotal: 1000 kB\nMemAvailable: {available} kB\n")
        (tmp_path / "loadavg").write_text(f"0 0 0 1/{processes} 1\n")
        (tmp_path / "sys/kernel/pid_max").write_text("1000\n")
        return Admission(10, 0.2).refusal(3, tmp_path)

    assert says() is None
    assert "memory are left" in says(available=199)
    assert "processes run" in says(processes=899)


def test_projects_see_and_touch_their_own_and_what_is_below(make_edge):
    edge = make_edge()
    mine, below, other = (edge.create(wished(edge, name))["id"] for name in ("lab", "lab/anna", "labs"))
    assert {one["id"] for one in edge.listing("lab")} == {mine, below}
    assert edge.find(below, "lab").id == below
    for identity, project in ((other, "lab"), (mine, "lab/anna"), (below, "lab/ann")):
        with pytest.raises(AccessDenied):
            edge.living(identity, project)
        with pytest.raises(AccessDenied):
            edge.close(identity, project)
    with pytest.raises(SandboxClosed, match="was closed"):
        edge.living("n1.f-9", "lab")


def test_time_runs_out_for_the_idle_and_for_the_old_and_not_under_a_request(make_edge):
    edge = make_edge()
    _, old, busy = (edge.create(wished(edge, **given)) for given in ({"idle": 1000}, {"ttl": 2000}, {"idle": 1000}))
    for one in edge.held.values():
        one.used -= 1500
        one.created -= 1500
    with edge.working(edge.find(busy["id"], "p")):
        edge.maintain()
        assert set(edge.held) == {old["id"], busy["id"]}
        edge.held[old["id"]].created -= 1000
        edge.maintain()
        assert set(edge.held) == {busy["id"]}
    edge.maintain()
    assert set(edge.held) == {busy["id"]}  # it has just been used
    assert [file.name for file in (edge.config.state / "sandboxes").iterdir()] == [f"{busy['id'][3:]}.json"]


def test_another_run_of_an_edge_finds_its_sandboxes_with_their_clocks(make_edge):
    first = make_edge()
    made = first.create(wished(first, "lab", ttl=500, idle=200))
    second = make_edge()
    assert second.adopt() == (1, 0)
    held = second.find(made["id"], "lab")
    assert (held.wish, held.created) == (first.held[made["id"]].wish, first.held[made["id"]].created)
    assert abs(held.used - time.time()) < 60 and second.change > first.change - 1
    held.wish = dataclasses.replace(held.wish, kind="microvm")
    second._save(held)
    third = make_edge()
    assert third.adopt() == (0, 1)
    with pytest.raises(SandboxLost, match="did not outlive"):
        third.living(made["id"], "lab")
    assert third.describe(third.find(made["id"], "lab"))["state"] == "lost"
    third.close(made["id"], "lab")
    first.held.clear()


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"kind": "vm"}, "no sandbox of this kind"),
        ({"limits": {"memory": 1}}, "at least"),
        ({"limits": {"nothing": 1}}, "limits"),
        ({"limits": {"allow_unenforced": True}}, "not for a fleet"),
        ({"ttl": 0}, "ttl"),
        ({"ttl": 10**9}, "up to"),
        ({"idle": True}, "idle"),
        ({"log": "a\nb"}, "log"),
        ({"log": 3}, "log"),
        ({"image": 3}, "image"),
        ({"workspace": "/"}, "no option"),
        ({"rules": ["host:99999"]}, "HOST:PORT"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(make_edge, request_, text):
    edge = make_edge()
    with pytest.raises((InvalidRequest, Unsupported), match=text):
        wished(edge, **request_)


@pytest.mark.parametrize("image", ["/", "../x", "..", ".", "a/b", "/etc", "n1.s-0", "", "x\n"])
def test_an_image_is_never_a_path_of_the_edge(make_edge, tmp_path, image):
    (tmp_path / "images").mkdir()
    edge = make_edge(images=tmp_path / "images")
    with pytest.raises(InvalidRequest):
        edge._image(wished(edge, image=image))


def test_a_creation_is_answered_with_its_own_change_though_others_follow_at_once(make_edge, monkeypatch):
    edge = make_edge()
    before, describe = edge.change, edge.describe

    def while_another_is_made(held):
        monkeypatch.setattr(edge, "describe", describe)
        edge.create(wished(edge))
        return describe(held)

    monkeypatch.setattr(edge, "describe", while_another_is_made)
    assert edge.create(wished(edge))["change"] == before + 1 and edge.change == before + 2


def test_an_older_answer_that_comes_last_is_no_news():
    """Two looks at once: the gateway's own, every second, and that of a creation for which there seemed to be no room."""
    status = {"name": "n1", "live": 1, "capacity": 5, "kinds": ["function"], "accepting": True}

    class Answers:
        changes = iter((12, 10, 13))

        async def get(self, path, timeout):
            change = next(self.changes)
            usage = {"p": [change - 10, 0]}
            return httpx.Response(
                200, json={**status, "change": change, "usage": usage}, request=httpx.Request("GET", "http://e")
            )

    watcher = Watcher(Edges(("unix:/e",)), None, patience=60.0)
    watcher.clients["unix:/e"] = Answers()
    seen = []
    for _ in range(3):
        asyncio.run(watcher.look())
        seen.append((watcher.seen[0].change, watcher.usage()["p"][0], watcher.ledger.answers["n1"]))
    assert seen == [(12, 2, 12), (12, 2, 12), (13, 3, 13)]


def test_an_edge_that_is_told_to_end_before_it_serves_ends_its_sandboxes(tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom nautile.sandbox.fleet import serving\n"
        "serving._serve = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"  # it has said that it is ready, and is not
        "serving.Edge.stop = lambda *_: print('ended', flush=True)\n"
        "place = Path(sys.argv[1])\n"
        "serving.serve_edge(serving.EdgeConfig('n1', place), f'unix:{place}/sock', None, leave=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["ready", f"unix:{tmp_path}/sock", "ended"])


def test_a_supervisor_that_is_stopped_as_it_starts_its_edge_again_leaves_none(monkeypatch):
    begun, told = [], threading.Event()

    class Child(subprocess.Popen):
        def __init__(self, *arguments, **options):
            begun.append(self)
            if len(begun) == 2:
                assert told.wait(60)  # until somebody has told the first one to end, which is dead
            super().__init__(*arguments, **options)

        def terminate(self):
            super().terminate()
            told.set()

    monkeypatch.setattr("nautile.sandbox.fleet.supervisor.subprocess.Popen", Child)
    command = ("/bin/sh", "-c", "echo ready unix:/nowhere; exec sleep 600")
    supervisor = Supervisor("n1", (), interval=0.01, command=command)
    supervisor.start()
    begun[0].kill()
    soon(lambda: len(begun) == 2)
    supervisor.stop()
    assert len(begun) == 2 and all(one.poll() is not None for one in begun)


def test_edge_urls_come_from_options_and_a_file_that_may_change(tmp_path):
    edges = Edges(("http://a:1",), tmp_path / "edges")
    assert edges.now() == ["http://a:1"]
    (tmp_path / "edges").write_text("# comment\nunix:/x\nhttp://a:1\n\n")
    assert edges.now() == ["http://a:1", "unix:/x"]
    (tmp_path / "edges").write_text("ftp://b\n")
    with pytest.raises(InvalidRequest, match="give http"):
        edges.now()
