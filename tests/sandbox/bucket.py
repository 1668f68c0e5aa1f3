"""A small S3-compatible server on the loopback: ranges, listings in pages, and signatures checked by another implementation."""

import hashlib
import hmac
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET = {"KEY": "secret/with+signs"}


class Bucket(ThreadingHTTPServer):
    """``objects``: what it holds; ``asked``: (method, key, range); ``spoil``: changes what is sent of a key."""

    def __init__(self, *, signed=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects, self.asked, self.signed, self.failures = {}, [], signed, 0
        self.spoil = lambda key, data: data
        self.ranges = True
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/bucket"

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def key(self):
        path, _, query = self.path.partition("?")
        return urllib.parse.unquote(path).removeprefix("/bucket").lstrip("/"), query

    def answer(self, status, data=b"", headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def allowed(self):
        self.server.asked.append((self.command, self.key()[0], self.headers.get("Range")))
        if self.server.failures:
            self.server.failures -= 1
            self.answer(503)
            return False
        if self.server.signed and not genuine(self.command, self.path, self.headers):
            self.answer(403)
            return False
        return True

    def do_HEAD(self):
        if self.allowed():
            data = self.server.objects.get(self.key()[0])
            self.answer(404 if data is None else 200, data or b"")

    def do_GET(self):
        if not self.allowed():
            return None
        key, query = self.key()
        if not key:
            return self.listing(urllib.parse.parse_qs(query))
        data = self.server.objects.get(key)
        if data is None:
            return self.answer(404)
        data = self.server.spoil(key, data)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if found and self.server.ranges:
            first, last = int(found[1]), min(int(found[2]), len(data) - 1)
            return self.answer(206, data[first : last + 1], [("Content-Range", f"bytes {first}-{last}/{len(data)}")])
        return self.answer(200, data)

    def listing(self, query):
        keys = sorted(key for key in self.server.objects if key.startswith(query["prefix"][0]))
        start = int(query.get("continuation-token", ["0"])[0])
        page = "".join(f"<Contents><Key>{key}</Key></Contents>" for key in keys[start : start + 2])
        more = f"<NextContinuationToken>{start + 2}</NextContinuationToken>" if start + 2 < len(keys) else ""
        text = f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{page}{more}</ListBucketResult>'
        self.answer(200, text.encode())

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.allowed():
            self.server.objects[self.key()[0]] = data
            self.answer(200)

    def do_DELETE(self):
        if self.allowed():
            self.server.objects.pop(self.key()[0], None)
            self.answer(204)


def genuine(method, target, headers):
    """Signature version 4 as the specification tells a server to check it, from the request alone."""
    found = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=(\w+)/(\d{8})/([\w-]+)/s3/aws4_request, "
        r"SignedHeaders=([\w;-]+), Signature=([0-9a-f]{64})",
        headers.get("Authorization") or "",
    )
    if found is None or found[1] not in SECRET or "host" not in found[4].split(";"):
        return False
    path, _, query = target.partition("?")
    pairs = sorted(urllib.parse.parse_qsl(query, keep_blank_values=True))
    query = "&".join(f"{urllib.parse.quote(name, safe='')}={urllib.parse.quote(value, safe='')}" for name, value in pairs)
    lines = "".join(f"{name}:{headers[name].strip()}\n" for name in found[4].split(";"))
    request = f"{method}\n{path}\n{query}\n{lines}\n{found[4]}\n{headers['x-amz-content-sha256']}"
    date = headers["x-amz-date"]
    scope = f"{found[2]}/{found[3]}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{date}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = ("AWS4" + SECRET[found[1]]).encode()
    for part in (found[2], found[3], "s3", "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return date.startswith(found[2]) and hmac.new(key, text.encode(), hashlib.sha256).hexdigest() == found[5]
