"""Images: what goes into a layer comes out of it, whatever the source; hostile and broken ones are told apart and refused."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import stat
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.cli import main
from nautile.sandbox import Image, Sandbox, SandboxError
from nautile.sandbox.errors import ImageRefused
from nautile.sandbox.images import Credentials, ImageStore
from nautile.sandbox.images.blobs import DirectoryBlobs, HttpBlobs
from nautile.sandbox.images.chunks import Chunks, trim
from nautile.sandbox.images.store import materialise
from nautile.sandbox.images.tree import CHUNK, Inode, Layer
from nautile.sandbox.images.write import LayerWriter, add_directory, add_tar
from sandbox.bucket import SECRET, Bucket
from waiting import soon

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="makes the device nodes of overlayfs: root only")


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path / "store", cache=tmp_path / "cache")


def tar(*members, mode="w"):
    """A tar file's bytes of (name, type, link or content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, kind, rest in members:
            entry = tarfile.TarInfo(name)
            entry.type = kind
            if kind == tarfile.REGTYPE:
                entry.size = len(rest)
                archive.addfile(entry, io.BytesIO(rest))
            else:
                entry.linkname = rest
                archive.addfile(entry)
    return file.getvalue()


def described(place):
    """Everything below a directory that a layer keeps."""
    found = {}
    for path in [place, *sorted(place.rglob("*"))]:
        one = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(one.st_mode) else os.readlink(path) if path.is_symlink() else None
        mode = one.st_mode if not path.is_symlink() else stat.S_IFLNK
        found[str(path.relative_to(place))] = (mode, one.st_uid, one.st_gid, int(one.st_mtime), content, one.st_rdev)
    return found


def some_tree(place):
    (place / "d/e").mkdir(parents=True)
    (place / "d/big").write_bytes(os.urandom(CHUNK * 2 + 17))
    (place / "d/empty").touch()
    os.link(place / "d/big", place / "d/e/again")
    (place / "link").symlink_to("../../etc/passwd")
    (place / os.fsdecode(b"odd\xff\n")).write_bytes(b"x")
    os.mkfifo(place / "pipe")
    os.setxattr(place / "d/empty", "user.note", b"kept\xfe")
    (place / "d").chmod(0o711)
    (place / "d/big").chmod(0o640)
    if os.geteuid() == 0:
        os.chown(place / "d/big", 1000, 1001)
    for path in [place, *place.rglob("*")]:
        os.utime(path, (1_600_000_000, 1_600_000_000 + len(str(path))), follow_symlinks=False)


# -- round trips


def test_a_directory_comes_out_as_it_went_in(store, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    some_tree(source)
    made = store.build("tree", [("base", source)])
    (layer,) = store.image("tree", "directory").layers
    assert described(layer) == described(source)
    assert (layer / "d/big").stat().st_ino == (layer / "d/e/again").stat().st_ino
    assert os.getxattr(layer / "d/empty", "user.note") == b"kept\xfe"
    assert made.parts[0].size == CHUNK * 2 + 18  # the content of two names of one file is there once
    assert store.build("same", [("base", source)]).parts == made.parts  # the same content has the same address


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_a_tar_gives_what_its_directory_gives(store, tmp_path, mode):
    source = tmp_path / "source"
    source.mkdir()
    some_tree(source)
    os.removexattr(source / "d/empty", "user.note")  # Python's tar keeps none
    (source / "pipe").chmod(0o644)
    with tarfile.open(tmp_path / "t", mode) as archive:
        archive.add(source, ".", filter=lambda one: dataclasses.replace(one) if dataclasses.is_dataclass(one) else one)
    store.build("tar", [("base", tmp_path / "t")])
    store.build("directory", [("base", source)])
    one, other = (store.image(name, "directory").layers[0] for name in ("tar", "directory"))
    assert described(one) == described(other)


names = st.sampled_from(["a", "b", "c", "\udcff", "x y"])
paths = st.lists(names, min_size=1, max_size=4).map("/".join)
operations = st.lists(
    st.tuples(
        st.sampled_from(["file", "directory", "link", "whiteout", "opaque", "hard"]), paths, st.binary(max_size=40), paths
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(operations)
def test_a_layer_holds_what_was_added_last(steps):  # noqa: PLR0912
    """Against a plain dictionary of paths; what a writer refuses the dictionary has no place for."""
    data, model = io.BytesIO(), {}
    writer = LayerWriter(data, "test")
    for kind, path, content, other in steps:
        above = [path.rsplit("/", count)[0] for count in range(1, path.count("/") + 1)]
        blocked = any(model.get(one, ("directory",))[0] != "directory" for one in above)
        if kind == "opaque":
            blocked = blocked or model.get(path, ("directory",))[0] != "directory"
        if kind == "hard":
            blocked = blocked or model.get(other, ("directory",))[0] == "directory"
        try:
            if kind == "opaque":
                writer.opaque(path)
            elif kind == "hard":
                writer.link(path, other)
            elif kind == "file":
                writer.add(path, Inode(kind, 0o644, size=len(content)), io.BytesIO(content))
            else:
                writer.add(path, Inode(kind, target=other if kind == "link" else ""))
            assert not blocked
        except ImageRefused:
            assert blocked
            if kind != "hard":
                return  # directories above may have been made
            continue
        for one in above:
            model.setdefault(one, ("directory", None))
        replaces = model.get(path, ("",))[0]
        if not (kind in ("directory", "opaque") and replaces == "directory"):
            model = {one: value for one, value in model.items() if not one.startswith(path + "/")}
            model[path] = model[other] if kind == "hard" else ("directory" if kind == "opaque" else kind, content)
    layer = Layer.unpack(writer.finish().pack(), "test")
    found = {path: layer.inodes[number] for path, number in layer.walk()}
    assert {path: inode.kind for path, inode in found.items()} == {path: value[0] for path, value in model.items()}
    for path, inode in found.items():
        if inode.kind == "file":
            assert data.getvalue()[inode.offset : inode.offset + inode.size] == model[path][1]


@root_only
def test_layers_hide_what_is_below_them(store, tmp_path, fresh):
    """Whiteouts and opaque directories of a tar mean the same when a layer is unpacked and when it is lazy."""
    (tmp_path / "below.tar").write_bytes(
        tar(("d/old", tarfile.REGTYPE, b"1"), ("o/old", tarfile.REGTYPE, b"2"), ("k/old", tarfile.REGTYPE, b"3"))
    )
    above = [("d/.wh.old", tarfile.REGTYPE, b""), ("o/.wh..wh..opq", tarfile.REGTYPE, b""), ("o/new", tarfile.REGTYPE, b"4")]
    (tmp_path / "above.tar").write_bytes(tar(*above))
    store.build("below", [("base", tmp_path / "below.tar")], host_usr=True)
    store.build("both", [("toolkit", tmp_path / "above.tar")], base="below")
    for mode in ("directory", "lazy"):
        sandbox = fresh(image=store.image("both", mode))
        assert sandbox.run("cd /; find d o k | sort; cat k/old o/new").stdout == "d\nk\nk/old\no\no/new\n34", mode
    with pytest.raises(ImageRefused, match="it is not in"):
        store.describe("nobody")


def test_a_layer_that_is_made_again_at_its_path_is_another_one(own_keeper, fresh, tmp_path):
    """A container that was made ahead has what was there before: by now an empty directory that nobody can name."""
    place, seen = tmp_path / "layer", []
    for text in ("first", "second"):
        (place / "etc").mkdir(parents=True)
        (place / "etc/text").write_text(text)
        seen.append(fresh(image=Image((place,), host_usr=True)).run("cat /etc/text").stdout)  # it stays: spares need company
        soon(lambda: len(list(own_keeper.glob("c-*/state.json"))) > 1)  # one more like it has been made ahead
        shutil.rmtree(place)
    assert seen == ["first", "second"]


# -- hostile sources


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([("../x", tarfile.REGTYPE, b"")], "leads out"),
        ([("a/../../x", tarfile.REGTYPE, b"")], "leads out"),
        ([("d", tarfile.SYMTYPE, "/tmp"), ("d/x", tarfile.REGTYPE, b"")], "through a link"),
        ([("f", tarfile.REGTYPE, b""), ("f/x", tarfile.REGTYPE, b"")], "in a file"),
        ([("h", tarfile.LNKTYPE, "../../etc/passwd")], "leads out"),
        ([("h", tarfile.LNKTYPE, "etc/passwd")], "not a file in it"),
        ([("l", tarfile.SYMTYPE, "/etc"), ("h", tarfile.LNKTYPE, "l/passwd")], "not a file in it"),
        ([("d", tarfile.DIRTYPE, ""), ("h", tarfile.LNKTYPE, "d")], "not a file in it"),
        ([("disk", tarfile.BLKTYPE, "")], "a device"),
        ([("etc/kmem", tarfile.CHRTYPE, "")], "a device"),
        ([("x" * 300, tarfile.REGTYPE, b"")], "too long"),
        ([("/".join("d" * 600), tarfile.REGTYPE, b"")], "too long"),
    ],
)
def test_hostile_archives_are_refused_and_nothing_is_made(store, tmp_path, members, why):
    (tmp_path / "t").write_bytes(tar(*members))
    with pytest.raises(ImageRefused, match=why):
        store.build("bad", [("base", tmp_path / "t")])
    assert store.list() == [] and not any(store.blobs.digests())
    assert not [one for one in (tmp_path / "cache").iterdir() if one.name.startswith(".building")]


def test_absolute_names_stay_inside_devices_of_dev_are_left_out_and_links_stay_links(store, tmp_path):
    (tmp_path / "t").write_bytes(
        tar(("/etc/x", tarfile.REGTYPE, b"1"), ("dev/null", tarfile.CHRTYPE, ""), ("out", tarfile.SYMTYPE, "/etc/passwd"))
    )
    store.build("image", [("base", tmp_path / "t")])
    (layer,) = store.image("image", "directory").layers
    assert sorted(str(path.relative_to(layer)) for path in layer.rglob("*")) == ["etc", "etc/x", "out"]
    assert os.readlink(layer / "out") == "/etc/passwd"


def test_what_is_cut_off_or_too_large_is_refused(store, tmp_path):
    whole = tar(("f", tarfile.REGTYPE, os.urandom(5000)))
    for data in (whole[:3000], gzip.compress(whole)[:-20], b"not a tar at all" * 100):
        (tmp_path / "t").write_bytes(data)
        with pytest.raises(ImageRefused, match=r"tar|shorter"):
            store.build("bad", [("base", tmp_path / "t")])
    with pytest.raises(ImageRefused, match="more than 4,000 bytes"), open(tmp_path / "t", "w+b") as file:
        file.write(whole)
        file.seek(0)
        add_tar(LayerWriter(io.BytesIO(), "bomb", most=4000), file)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_an_index_that_was_changed_is_refused_or_still_makes_sense(data):
    """A fuzzer on the decompressed JSON: never another exception, never a name or an offset that leads out."""
    file = io.BytesIO()
    writer = LayerWriter(file, "fuzz")
    writer.add("a/b", Inode("file", 0o644, size=3), io.BytesIO(b"abc"))
    writer.add("l", Inode("link", target="a"))
    body = json.loads(zlib.decompress(writer.finish().pack()))
    places = [body, *body["inodes"], body["inodes"][0][9]]
    place = data.draw(st.sampled_from(places))
    key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
    values = st.one_of(
        st.none(),
        st.integers(-5, 2**70),
        st.text(max_size=3),
        st.just([]),
        st.just({"..": 1}),
        st.just({"x": 0}),
        st.just({"/": 2}),
    )
    place[key] = data.draw(values)
    try:
        layer = Layer.unpack(zlib.compress(json.dumps(body).encode()), "fuzz")
    except ImageRefused:
        return
    for path, number in layer.walk():
        inode = layer.inodes[number]
        assert ".." not in path.split("/") and inode.offset + inode.size <= layer.size


@given(st.binary(max_size=200))
def test_garbage_is_no_index(data):
    with pytest.raises(ImageRefused):
        Layer.unpack(data, "garbage")


def test_an_index_that_unfolds_without_end_is_refused():
    bomb = zlib.compress(b" " * (600 * 2**20), 9)
    with pytest.raises(ImageRefused, match="too large"):
        Layer.unpack(bomb, "bomb")


# -- OCI


def oci(place, layers, architecture=None, spoil=None):
    """An OCI layout of tars."""
    here = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    blobs = place / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data, kind):
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data if spoil != kind else data + b" ")
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    configuration = put(json.dumps({"architecture": architecture or here, "os": "linux"}).encode(), "config.v1+json")
    told = [put(layer, "layer.v1.tar+gzip") for layer in layers]
    manifest = put(json.dumps({"schemaVersion": 2, "config": configuration, "layers": told}).encode(), "manifest.v1+json")
    (place / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (place / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}))
    return place


def test_an_oci_layout_keeps_its_layers(store, tmp_path):
    first = gzip.compress(tar(("a/x", tarfile.REGTYPE, b"1"), ("a/y", tarfile.REGTYPE, b"2")), mtime=0)
    second = tar(("a/.wh.x", tarfile.REGTYPE, b""))
    made = store.build("oci", [("base", oci(tmp_path / "oci", [first, second]))])
    assert [part.size for part in made.parts] == [2, 0]
    layer, _ = store.layer(made.parts[1], "oci")
    assert {path: layer.inodes[number].kind for path, number in layer.walk()} == {"a": "directory", "a/x": "whiteout"}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"architecture": "s390x"}, "linux/s390x, and this machine is"),
        ({"spoil": "layer.v1.tar+gzip"}, "is not what its name says"),
        ({"spoil": "manifest.v1+json"}, "is not what its name says"),
        ({"spoil": "config.v1+json"}, "is not what its name says"),
    ],
)
def test_broken_oci_layouts_are_refused(store, tmp_path, options, why):
    place = oci(tmp_path / "oci", [gzip.compress(tar(("x", tarfile.REGTYPE, b"1")))], **options)
    with pytest.raises(ImageRefused, match=why):
        store.build("bad", [("base", place)])
    (place / "index.json").write_text('{"manifests": [{"digest": "sha256:../../etc/passwd"}]}')
    with pytest.raises(ImageRefused, match="no known kind"):
        store.build("bad", [("base", place)])
    (place / "index.json").write_text("[[[[")
    with pytest.raises(ImageRefused, match="not an OCI layout"):
        store.build("bad", [("base", place)])


def test_an_image_of_another_processor_is_refused(store, tmp_path):
    program = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, 22) + bytes(44)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/tool").write_bytes(program)
    (tmp_path / "root/tool").chmod(0o755)
    assert store.build("mainframe", [("base", tmp_path / "root")]).parts[0].machine == "s390x"
    with pytest.raises(ImageRefused, match="it is for s390x, and this machine is"):
        store.image("mainframe")


# -- stores


def test_removing_an_image_keeps_what_others_need(store, tmp_path):
    (tmp_path / "one.tar").write_bytes(tar(("x", tarfile.REGTYPE, os.urandom(1000))))
    (tmp_path / "two.tar").write_bytes(tar(("y", tarfile.REGTYPE, os.urandom(3000))))
    store.build("one", [("base", tmp_path / "one.tar")])
    store.build("two", [("toolkit", tmp_path / "two.tar")], base="one")
    assert [one.name for one in store.list()] == ["one", "two"]
    assert 3000 < store.remove("two") < 6000
    assert store.image("one", "directory").layers[0].joinpath("x").stat().st_size == 1000
    store.remove("one")
    assert not any(store.blobs.digests())


@pytest.mark.parametrize("signed", [False, True])
def test_a_bucket_is_a_store_like_a_directory(tmp_path, signed):
    (tmp_path / "root").mkdir()
    some_tree(tmp_path / "root")
    with Bucket(signed=signed) as bucket:
        credentials = Credentials("KEY", SECRET["KEY"]) if signed else None
        store = ImageStore(bucket.url, cache=tmp_path / "cache", credentials=credentials)
        made = store.build("image", [("base", tmp_path / "root")])
        bucket.failures = 2  # it is busy for a moment
        assert store.list() == [made]
        layer, _ = store.layer(made.parts[0], "image")
        bucket.asked.clear()
        chunks = Chunks(layer, store.blobs, tmp_path / "chunks")
        offset = next(inode.offset for inode in layer.inodes if inode.size > CHUNK)
        assert chunks.read(offset + CHUNK - 5, 10) == (tmp_path / "root/d/big").read_bytes()[CHUNK - 5 : CHUNK + 5]
        assert [(method, wanted) for method, _, wanted in bucket.asked] == [
            ("GET", f"bytes=0-{CHUNK - 1}"),
            ("GET", f"bytes={CHUNK}-{2 * CHUNK - 1}"),
        ]
        if signed:
            with pytest.raises(ImageRefused, match="answered 403"):
                HttpBlobs(bucket.url, Credentials("KEY", "wrong")).names()
        store.remove("image")
        assert bucket.objects == {}


def test_what_a_store_sends_is_checked(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/f").write_bytes(os.urandom(CHUNK + 5))
    with Bucket() as bucket:
        store = ImageStore(bucket.url, cache=tmp_path / "cache")
        part = store.build("image", [("base", tmp_path / "root")]).parts[0]
        layer, _ = store.layer(part, "image")
        bucket.spoil = lambda key, data: data[:100] + b"!" + data[101:] if key.endswith(part.data) else data
        chunks = Chunks(layer, store.blobs, tmp_path / "chunks")
        with pytest.raises(ImageRefused, match="chunk 0 is not what its index says"):
            chunks.read(0, 10)
        assert chunks.read(CHUNK, 5) == (tmp_path / "root/f").read_bytes()[-5:] and chunks.fetched.failures == 1
        bucket.spoil = lambda key, data: data
        assert chunks.read(0, 10) == (tmp_path / "root/f").read_bytes()[:10]  # mended: what was wrong was not kept
        bucket.ranges = False
        with pytest.raises(ImageRefused, match="does not answer range requests"):
            Chunks(layer, store.blobs, tmp_path / "other").read(0, 10)
        bucket.spoil = lambda key, data: b"{" if key.startswith("blobs/") else data
        with pytest.raises(ImageRefused):
            ImageStore(bucket.url, cache=tmp_path / "fresh").describe("image")
    gone = ImageStore(bucket.url, cache=tmp_path / "cache")
    with pytest.raises(ImageRefused, match="cannot be reached"):
        gone.list()


def test_a_cache_that_was_damaged_is_fetched_again_and_can_be_trimmed(store, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/f").write_bytes(os.urandom(4 * CHUNK))
    layer, _ = store.layer(store.build("image", [("base", tmp_path / "root")]).parts[0], "image")
    cache = tmp_path / "chunks"
    whole = Chunks(layer, store.blobs, cache).read(0, 4 * CHUNK)
    for file in cache.glob("*/*"):
        file.write_bytes(b"damaged")
    again = Chunks(layer, store.blobs, cache)
    assert again.read(0, 4 * CHUNK) == whole == (tmp_path / "root/f").read_bytes() and again.fetched.requests == 4
    assert trim(cache, 2 * CHUNK) == 2 and len(list(cache.glob("*/*"))) == 2


# -- the command


def test_images_from_the_command_line(tmp_path, capfd):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/f").write_bytes(bytes(2**20))
    where = ["--store", str(tmp_path / "store")]
    assert main(["sandbox", "image", "build", "mine", str(tmp_path / "root"), *where]) == 0
    assert "mine is 1.0 MiB" in capfd.readouterr().out
    assert main(["sandbox", "image", "list", "--json", *where]) == 0
    assert json.loads(capfd.readouterr().out)["name"] == "mine"
    assert main(["sandbox", "image", "rm", "mine", *where]) == 0
    assert main(["sandbox", "image", "list", *where]) == 0
    assert "no image in" in capfd.readouterr().out
    for arguments, said in (
        (["build", "Bad Name", str(tmp_path)], "it is not a name"),
        (["build", "x", str(tmp_path / "none")], "there is nothing"),
        (["rm", "nothing"], "it is not in"),
        (["build", "x", str(tmp_path / "root"), "--base", "nothing"], "it is not in"),
        (["list", "--store", "http://"], "not an http or https URL"),
    ):
        assert main(["sandbox", "image", *arguments, *([] if "--store" in arguments else where)]) == 1
        error = capfd.readouterr().err
        assert said in error and error.count("\n") == 1 and "Traceback" not in error


def test_a_name_that_is_no_image_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SandboxError, match="no-such-image"):
        Sandbox.create("container", image="no-such-image")


def test_unpacking_asks_nothing_of_the_names(tmp_path):
    """The unpacker relies on the index's checks: without them a hostile index would lead out."""
    inodes = [Inode("directory", entries={"../escaped": 1}), Inode("file")]
    hostile = Layer(inodes, 0, "0" * 64, [])
    with pytest.raises(ImageRefused, match="is not a name"):
        Layer.unpack(hostile.pack(), "hostile")
    (tmp_path / "above").mkdir()
    materialise(hostile, Chunks(hostile, DirectoryBlobs(tmp_path), tmp_path / "c"), tmp_path / "above/layer")
    assert (tmp_path / "above/escaped").exists()  # the check is what prevents it


def test_a_directory_that_is_none_is_refused(tmp_path):
    with pytest.raises(ImageRefused, match="not a directory"):
        add_directory(LayerWriter(io.BytesIO(), "x"), Path("/dev/null"))
