"""Lazy layers in containers: the same files as unpacked ones, fetched when they are read, checked, and gone with the keeper."""

import hashlib
import os
import signal
from pathlib import Path

import pytest

from nautile.sandbox.container import KeeperClient
from nautile.sandbox.images import ImageStore
from nautile.sandbox.images.tree import CHUNK
from sandbox.bucket import Bucket
from sandbox.conftest import need
from waiting import soon

pytestmark = pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse is missing or not ours: modprobe fuse, or run as root"
)
BIG = 40 * CHUNK


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    place = tmp_path_factory.mktemp("lazy") / "root"
    (place / "data/deep").mkdir(parents=True)
    (place / "data/big").write_bytes(os.urandom(BIG))
    (place / "data/small").write_text("small\n")
    (place / "data/link").symlink_to("small")
    os.link(place / "data/small", place / "data/deep/hard")
    for number in range(500):
        (place / f"data/deep/{number:03}").write_text(f"{number}\n" * number)
    os.setxattr(place / "data/small", "user.note", b"kept")
    return place


@pytest.fixture
def bucket():
    with Bucket() as found:
        yield found


@pytest.fixture
def store(bucket, source, tmp_path):
    found = ImageStore(bucket.url, cache=tmp_path / "cache")
    found.build("image", [("workspace", source)], host_usr=True)
    return found


LISTING = (
    "cd /data; find . | sort | xargs stat -c '%n %F %a %U %s %h %Y'; find . -type f ! -name big | sort | xargs cat | sha256sum"
)


def test_a_lazy_layer_is_what_an_unpacked_one_is(store, fresh):
    lazy = fresh(image=store.image("image", "lazy"))
    whole = fresh(image=store.image("image", "directory"))
    one, other = lazy.run(LISTING), whole.run(LISTING)
    assert one.ok, one.stderr
    without = [text.replace(" directory ", " ").split(" ") for text in (one.stdout, other.stdout)]
    assert len(without[0]) > 500 and [line for line in one.stdout.splitlines() if " directory " not in line] == [
        line for line in other.stdout.splitlines() if " directory " not in line
    ]
    assert lazy.run("cat /data/link /data/deep/hard; ls /data/none; getfattr -n user.note /data/small").stdout.startswith(
        "small\nsmall\n"
    )
    assert lazy.read("/data/small") == b"small\n"
    assert {entry.name for entry in lazy.list("/data")} == {"big", "small", "link", "deep"}


def ranges(bucket, store):
    """What was asked for of the image's data."""
    data = store.describe("image").parts[0].data
    return [wanted for method, key, wanted in bucket.asked if method == "GET" and key.endswith(data)]


def test_only_what_is_read_is_fetched(store, bucket, fresh):
    bucket.asked.clear()
    sandbox = fresh(image=store.image("image"))
    assert sandbox.run("ls -R /data | wc -l; stat /data/big; cat /data/small").ok
    assert len(ranges(bucket, store)) == 1  # names and sizes cost nothing; one small file is one chunk
    result = sandbox.run("dd if=/data/big bs=4096 skip=2000 count=1 status=none | wc -c")
    assert result.stdout == "4096\n"
    soon(lambda: store.fetched("image").requests == len(ranges(bucket, store)))  # it is noted a moment later
    fetched = store.fetched("image")
    assert fetched.bytes < 8 * CHUNK and fetched.size > BIG and fetched.failures == 0


def test_a_file_is_right_however_it_is_read_and_is_fetched_once(store, bucket, source, fresh):
    image = store.image("image")
    first, second = fresh(image=image), fresh(image=image)
    script = (
        "import hashlib, mmap, random, threading\n"
        "def read(seed):\n"
        "    chance = random.Random(seed)\n"
        "    with open('/data/big', 'rb', 0) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:\n"
        "        for _ in range(60):\n"
        "            at = chance.randrange(len(view)); size = chance.randrange(1, 2**18)\n"
        "            file.seek(at); assert view[at:at + size] == (file.read(size) if at + size <= len(view) else view[at:])\n"
        "threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]\n"
        "[one.start() for one in threads]; [one.join() for one in threads]\n"
        "print(hashlib.sha256(open('/data/big', 'rb').read()).hexdigest())\n"
    )
    wanted = hashlib.sha256((source / "data/big").read_bytes()).hexdigest()
    for sandbox in (first, second):
        result = sandbox.python(script, timeout=200)
        assert result.stdout.strip() == wanted and not result.stderr, result.stderr
    fetched = ranges(bucket, store)
    assert len(fetched) == len(set(fetched)) >= BIG // CHUNK


def test_the_tenant_writes_above_it_and_never_into_it(store, fresh):
    sandbox = fresh(image=store.image("image"))
    result = sandbox.run("echo x > /data/small; cat /data/small; rm /data/small")
    assert result.stdout == "small\n" and result.exit_code != 0  # it belongs to the image's root
    child = sandbox.fork()
    try:
        assert child.run("cat /data/small").stdout == "small\n"
    finally:
        child.close()


def test_a_store_that_fails_is_an_error_of_the_read_and_heals(store, bucket, fresh):
    sandbox = fresh(image=store.image("image"))
    assert sandbox.run("ls /data").ok
    bucket.spoil = lambda key, data: bytes(len(data)) if len(data) > CHUNK else data
    spoilt = sandbox.run("cat /data/small")
    assert spoilt.exit_code == 1 and "Input/output error" in spoilt.stderr and spoilt.infrastructure_error is None
    bucket.spoil = lambda key, data: data
    assert sandbox.run("cat /data/small").stdout == "small\n"
    soon(lambda: store.fetched("image").failures > 0)  # it is noted a moment later


def servers():
    """Processes behind lazy layers of this keeper: they hold /dev/fuse."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes()
            if os.fsencode(KeeperClient().place) in words and os.readlink(place / "fd/3") == "/dev/fuse":
                found.append(int(place.name))
        except OSError:
            continue
    return found


def test_a_dead_server_is_replaced_for_the_next_container(store, fresh, own_keeper):
    image = store.image("image")
    first = fresh(image=image)
    assert first.run("cat /data/small").ok
    (server,) = servers()
    os.kill(server, signal.SIGKILL)
    soon(lambda: not servers())
    assert first.run("cat /data/deep/001").exit_code != 0
    assert fresh(image=store.image("image"), limits=first._limits.__class__()).run("cat /data/deep/001").stdout == "1\n"


def test_nothing_is_left_when_the_keeper_ends(store, own_keeper, fresh):
    sandbox = fresh(image=store.image("image"))
    assert sandbox.run("cat /data/small").ok
    assert len(servers()) == 1
    KeeperClient().stop()
    soon(lambda: not servers())
    assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "nautile-lazy" in line]


@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices: root only")
@pytest.mark.parametrize("mode", [pytest.param("erofs", marks=pytest.mark.slow), "squashfs"])
def test_images_of_one_file(store, fresh, mode):
    need("mkfs.erofs" if mode == "erofs" else "mksquashfs")
    one = fresh(image=store.image("image", mode))
    assert one.run("cat /data/link; ls /data/deep | wc -l; stat -c %U /data/small").stdout == "small\n501\nroot\n"
