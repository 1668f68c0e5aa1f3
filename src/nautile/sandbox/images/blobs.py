"""Where images are kept: blobs by their sha256 and names for some of them. In a directory, or behind S3-compatible HTTP."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import http.client
import os
import re
import shutil
import ssl
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from xml.etree import ElementTree

from nautile.sandbox.errors import ImageRefused

__all__ = ["Blobs", "Credentials", "DirectoryBlobs", "HttpBlobs", "open_blobs"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TIMEOUT = 30.0
_ATTEMPTS = 4
_LISTING_LIMIT = 16 * 2**20


class Blobs(Protocol):
    """A store. Every method raises ImageRefused when something is not there or the store does not answer."""

    def read(self, digest: str, offset: int, length: int) -> bytes:
        """Part of a blob; shorter only at its end."""

    def size(self, digest: str) -> int: ...

    def has(self, digest: str) -> bool: ...

    def put(self, digest: str, source: Path) -> None:
        """Keep a file's content; a blob that is there stays as it is."""

    def delete(self, digest: str) -> None: ...

    def digests(self) -> Iterator[str]: ...

    def names(self) -> dict[str, str]:
        """What is named, and the digest of each."""

    def name(self, name: str, digest: str | None) -> None:
        """Give a name to a blob; None takes it away."""


def checked_name(name: str) -> str:
    """The name, if it is one. Raises ImageRefused."""
    if not _NAME.fullmatch(name):
        raise ImageRefused(name[:80], "it is not a name", "use a-z, 0-9, dot, dash and underscore, at most 128")
    return name


class DirectoryBlobs:
    """A directory, local or shared: ``blobs/HEX`` and ``names/NAME``. Files appear whole."""

    def __init__(self, place: Path) -> None:
        self.place = place.absolute()

    def _blob(self, digest: str) -> Path:
        return self.place / "blobs" / digest

    def read(self, digest: str, offset: int, length: int) -> bytes:
        try:
            with open(self._blob(digest), "rb", buffering=0) as file:
                return os.pread(file.fileno(), length, offset)
        except OSError as error:
            raise ImageRefused(digest[:12], f"a part of it cannot be read ({error.strerror})", "copy it again") from None

    def size(self, digest: str) -> int:
        try:
            return self._blob(digest).stat().st_size
        except OSError:
            raise ImageRefused(digest[:12], f"it is not in {self.place}", "copy it again") from None

    def has(self, digest: str) -> bool:
        return self._blob(digest).exists()

    def put(self, digest: str, source: Path) -> None:
        target = self._blob(digest)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=target.parent, prefix=".new-")
            with os.fdopen(handle, "wb") as out, open(source, "rb") as file:
                shutil.copyfileobj(file, out, 2**20)
                out.flush()
                os.fsync(out.fileno())
            os.rename(name, target)

    def delete(self, digest: str) -> None:
        self._blob(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError):
            yield from (name for name in os.listdir(self.place / "blobs") if _DIGEST.fullmatch(name))

    def names(self) -> dict[str, str]:
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for entry in sorted((self.place / "names").iterdir()):
                if _NAME.fullmatch(entry.name) and _DIGEST.fullmatch(text := entry.read_text().strip()):
                    found[entry.name] = text
        return found

    def name(self, name: str, digest: str | None) -> None:
        place = self.place / "names" / checked_name(name)
        if digest is None:
            return place.unlink(missing_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        new = place.with_name(f".{name}.{os.getpid()}")
        new.write_text(digest)
        os.rename(new, place)
        return None


@dataclass(frozen=True)
class Credentials:
    """For requests signed as AWS does (signature version 4)."""

    key: str
    secret: str
    region: str = "us-east-1"


class HttpBlobs:
    """A bucket: ``URL/blobs/HEX`` and ``URL/names/NAME``, read in ranges. Requests are signed if there are credentials."""

    def __init__(self, url: str, credentials: Credentials | None = None) -> None:
        self.url, self.credentials = url.rstrip("/"), credentials
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ImageRefused(url, "it is not an http or https URL", "write http://HOST:PORT/BUCKET")
        self._parts = parts

    def read(self, digest: str, offset: int, length: int) -> bytes:
        if length <= 0:
            return b""
        last = offset + length - 1
        status, data = self._ask("GET", f"blobs/{digest}", {"Range": f"bytes={offset}-{last}"}, limit=length)
        if status == 200:  # a server that knows no ranges sends all of it, which was cut off
            raise ImageRefused(digest[:12], "its store does not answer range requests", "use one that does (S3, nginx)")
        if status != 206:
            raise ImageRefused(digest[:12], f"its store answered {status}", "check the URL, the credentials and the bucket")
        return data

    def size(self, digest: str) -> int:
        status, data = self._ask("HEAD", f"blobs/{digest}", {})
        if status != 200:
            raise ImageRefused(digest[:12], f"it is not in {self.url} ({status})", "copy it again")
        return int(data)

    def has(self, digest: str) -> bool:
        return self._ask("HEAD", f"blobs/{digest}", {})[0] == 200

    def put(self, digest: str, source: Path) -> None:
        if not self.has(digest):
            self._put(f"blobs/{digest}", source.read_bytes() if source.stat().st_size < 2**26 else source)

    def _put(self, key: str, body: bytes | Path) -> None:
        status, _ = self._ask("PUT", key, {}, body=body)
        if status not in (200, 201, 204):
            raise ImageRefused(key, f"its store answered {status} to an upload", "check the credentials of the bucket")

    def delete(self, digest: str) -> None:
        self._ask("DELETE", f"blobs/{digest}", {})

    def digests(self) -> Iterator[str]:
        yield from (key.removeprefix("blobs/") for key in self._keys("blobs/") if _DIGEST.fullmatch(key.removeprefix("blobs/")))

    def names(self) -> dict[str, str]:
        found = {}
        for key in self._keys("names/"):
            status, data = self._ask("GET", key, {}, limit=100)
            text = data.decode("ascii", "replace").strip()
            if status == 200 and _DIGEST.fullmatch(text):
                found[key.removeprefix("names/")] = text
        return found

    def name(self, name: str, digest: str | None) -> None:
        if digest is None:
            self._ask("DELETE", f"names/{checked_name(name)}", {})
        else:
            self._put(f"names/{checked_name(name)}", digest.encode())

    def _keys(self, prefix: str) -> list[str]:
        """ListObjectsV2, in pages."""
        found: list[str] = []
        token = ""
        while True:
            query = f"list-type=2&prefix={urllib.parse.quote(prefix, safe='')}"
            query += f"&continuation-token={urllib.parse.quote(token, safe='')}" if token else ""
            status, data = self._ask("GET", "", {}, query=query, limit=_LISTING_LIMIT)
            if status != 200 or b"<!DOCTYPE" in data or b"<!ENTITY" in data:  # a listing needs neither; entities can explode
                raise ImageRefused(self.url, f"its store answered {status} to a listing", "check the URL and the credentials")
            try:
                root = ElementTree.fromstring(data)
            except ElementTree.ParseError:
                raise ImageRefused(self.url, "its store sent a listing that is not XML", "check the URL") from None
            found += [one.text or "" for one in root.iter() if one.tag.rpartition("}")[2] == "Key"]
            token = next((one.text or "" for one in root.iter() if one.tag.rpartition("}")[2] == "NextContinuationToken"), "")
            if not token:
                return found

    def _ask(
        self, method: str, key: str, headers: dict[str, str], *, body: bytes | Path = b"", query: str = "", limit: int = 0
    ) -> tuple[int, bytes]:
        """(status, body; of HEAD the length). Tries again when the store does not answer or says that it is busy."""
        said = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(0.1 * 4**attempt / 4)
            try:
                status, data = self._once(method, key, headers, body, query, limit)
            except (OSError, http.client.HTTPException) as error:
                said = str(error) or type(error).__name__
                continue
            if status < 500 and status != 429:
                return status, data
            said = f"it answered {status}"
        raise ImageRefused(self.url, f"its store cannot be reached ({said})", "check the URL and the network")

    def _once(
        self, method: str, key: str, headers: dict[str, str], body: bytes | Path, query: str, limit: int
    ) -> tuple[int, bytes]:
        secure = self._parts.scheme == "https"
        host = self._parts.hostname or ""
        if secure:
            context = ssl.create_default_context()
            channel: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, self._parts.port, timeout=_TIMEOUT, context=context
            )
        else:
            channel = http.client.HTTPConnection(host, self._parts.port, timeout=_TIMEOUT)
        path = f"{self._parts.path}/{key}".rstrip("/") or "/"
        with contextlib.closing(channel), contextlib.ExitStack() as stack:
            length = body.stat().st_size if isinstance(body, Path) else len(body)
            content = stack.enter_context(open(body, "rb")) if isinstance(body, Path) else body
            sent = {**headers, "Content-Length": str(length)} if method == "PUT" else dict(headers)
            sent |= self._signature(method, path, query) if self.credentials else {}
            channel.request(method, f"{path}?{query}" if query else path, content or None, sent)
            answer = channel.getresponse()
            if method == "HEAD":
                return answer.status, (answer.headers.get("Content-Length") or "0").encode()
            data = answer.read(limit) if limit else b""
            if answer.status == 206 and answer.length:
                raise http.client.HTTPException("it sent more than was asked for")
            return answer.status, data

    def _signature(self, method: str, path: str, query: str) -> dict[str, str]:
        """The headers of AWS signature version 4, the body unsigned."""
        assert self.credentials is not None
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        host = self._parts.netloc.rpartition("@")[2]
        ordered = "&".join(sorted(query.split("&"))) if query else ""
        headers = {"host": host, "x-amz-content-sha256": "UNSIGNED-PAYLOAD", "x-amz-date": now}
        canonical = "\n".join(
            [
                method,
                urllib.parse.quote(path),
                ordered,
                *(f"{name}:{value}" for name, value in headers.items()),
                "",
                ";".join(headers),
                "UNSIGNED-PAYLOAD",
            ]
        )
        scope = f"{now[:8]}/{self.credentials.region}/s3/aws4_request"
        text = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()])
        key = f"AWS4{self.credentials.secret}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        signature = hmac.new(key, text.encode(), "sha256").hexdigest()
        what = f"Credential={self.credentials.key}/{scope}, SignedHeaders={';'.join(headers)}, Signature={signature}"
        return {
            "x-amz-content-sha256": "UNSIGNED-PAYLOAD",
            "x-amz-date": now,
            "Authorization": f"AWS4-HMAC-SHA256 {what}",
        }


def open_blobs(where: str, credentials: Credentials | None = None) -> DirectoryBlobs | HttpBlobs:
    """A store by its directory or its URL."""
    if where.startswith(("http://", "https://")):
        return HttpBlobs(where, credentials)
    return DirectoryBlobs(Path(where))
