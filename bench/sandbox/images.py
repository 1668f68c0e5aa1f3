"""How much of an image a sandbox fetches when Python prints hello, lazily over HTTP in ranges, beside the eager ways.

    python bench/sandbox/images.py [--image debian:bookworm+python3-minimal] [--out bench/results/sandbox_images.json]

The image is made by mmdebstrap (about 190 MB, half a minute and a Debian mirror), or is a directory, a tar or an OCI layout.
Its store is a small HTTP server on the loopback with range requests. Every way starts with an empty cache.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nautile.sandbox import Sandbox
from nautile.sandbox.images import ImageStore

HELLO = ["python3", "-c", "print('hello')"]


class Ranges(SimpleHTTPRequestHandler):
    """A directory with range requests; counts the bytes of bodies that it sends. Names are listed as a bucket lists them."""

    sent = 0
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if "list-type=2" in query:
            keys = sorted(str(one.relative_to(self.directory)) for one in Path(self.directory).rglob("*") if one.is_file())
            prefix = query.partition("prefix=")[2].replace("%2F", "/")
            listing = "".join(f"<Contents><Key>{key}</Key></Contents>" for key in keys if key.startswith(prefix))
            return self.answer(200, f"<ListBucketResult>{listing}</ListBucketResult>".encode())
        try:
            with open(Path(self.directory, path.lstrip("/")), "rb") as file:
                wanted = self.headers.get("Range")
                if wanted is None:
                    return self.answer(200, file.read())
                first, last = map(int, wanted.removeprefix("bytes=").split("-"))
                return self.answer(206, os.pread(file.fileno(), last - first + 1, first))
        except FileNotFoundError:
            return self.answer(404, b"")

    def answer(self, status, data):
        type(self).sent += len(data)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def served(place):
    handler = type("Handler", (Ranges,), {"directory": str(place), "sent": 0})
    handler.__init__ = lambda self, *given: SimpleHTTPRequestHandler.__init__(self, *given, directory=str(place))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
        server.shutdown()


def once(url, handler, cache, mode):
    """(a row, the store) of one way to use the image: prepared, created, run twice."""
    handler.sent = 0
    began = time.perf_counter()
    store = ImageStore(url, cache=cache)
    image = store.image("python", mode)
    prepared = time.perf_counter()
    with Sandbox.create("container", image=image) as sandbox:
        created = time.perf_counter()
        first = sandbox.run(HELLO)
        ended = time.perf_counter()
        assert first.stdout == "hello\n", first
        again = time.perf_counter()
        assert sandbox.run(HELLO).ok
        twice = time.perf_counter()
    ms = lambda one, other: round((other - one) * 1000, 1)  # noqa: E731
    return {
        "bytes_from_the_store": handler.sent,
        "prepare_ms": ms(began, prepared),
        "create_ms": ms(prepared, created),
        "first_hello_ms": ms(created, ended),
        "second_hello_ms": ms(again, twice),
        "all_until_hello_ms": ms(began, ended),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", default="debian:bookworm+python3-minimal")
    parser.add_argument("--store", type=Path, help="keep the store here, and use it if it has the image already")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        local = ImageStore(arguments.store or place / "store", cache=place / "building")
        began = time.perf_counter()
        if "python" not in local.blobs.names():
            local.build("python", [("base", arguments.image)])
        building = time.perf_counter() - began
        size = local.describe("python").size
        rows = {}
        with served(local.blobs.place) as (url, handler):
            for mode, program in (("lazy", None), ("directory", None), ("erofs", "mkfs.erofs"), ("squashfs", "mksquashfs")):
                if program is not None and shutil.which(program) is None:
                    rows[mode] = f"{program} is missing"
                    continue
                rows[mode] = once(url, handler, place / mode, mode)
                rows[mode]["share"] = round(rows[mode]["bytes_from_the_store"] / size, 4)
            rows["lazy, cached before"] = once(url, handler, place / "lazy", "lazy")
            rows["lazy, cached before"]["share"] = round(rows["lazy, cached before"]["bytes_from_the_store"] / size, 4)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "device": f"{platform.machine()}, {os.cpu_count()} processors",
        "kernel": platform.release(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "image": arguments.image,
        "image_bytes": size,
        "build_seconds": round(building, 1),
        "bar": "a lazy hello fetches at most 15 % of the image",
        "met": rows["lazy"]["share"] <= 0.15,
        "ways": rows,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
