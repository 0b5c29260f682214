"""One reader for each kind of source: what `remote.fetch` asks of object stores, HTTPS servers and the Hub."""

import base64
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.client import HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, Any

from tucka_runtime.adapters.files import served_files
from tucka_runtime.adapters.remote import ChangedError, RemoteFile, Source, SourceReader
from tucka_runtime.errors import InvalidAdapterError, SourceError

PIECE_BYTES = 4 * 2**20
TIMEOUT_SECONDS = 30  # without a byte

_SHA256 = re.compile(r"[0-9a-f]{64}")


def reader_of(source: Source) -> SourceReader:
    """A reader of a source that is not on this machine."""
    kinds: dict[str, type[StoreReader | HTTPSReader | HubReader]] = {"https": HTTPSReader, "hf": HubReader}
    return kinds.get(source.scheme, StoreReader)(source)


class StoreReader:
    """An object store, by fsspec. No listing is kept: what was put a moment ago is there."""

    def __init__(self, source: Source):
        import fsspec

        self._files: Any = fsspec.filesystem(source.scheme, skip_instance_cache=True, use_listings_cache=False)
        self._root = source.location

    def look(self, path: str) -> RemoteFile:
        info = self._files.info(f"{self._root}/{path}")
        if info["type"] != "file":
            raise FileNotFoundError
        md5 = info.get("md5Hash")  # Google's; S3's ETag is one only where nothing encrypts with keys of its own
        digests = {"md5": base64.b64decode(md5).hex()} if md5 else {}
        return RemoteFile(info["size"], str(info.get("ETag") or info.get("etag")), digests)

    def read(self, path: str, file: RemoteFile, start: int) -> Iterator[bytes]:
        while start < file.size:
            end = min(start + PIECE_BYTES, file.size)
            yield self._files.cat_file(f"{self._root}/{path}", start=start, end=end)
            start = end
        if self.look(path) != file:
            raise ChangedError


class HTTPSReader:
    """A web server: files below an address. Only that host is asked, wherever it redirects to.

    The variable `TUCKA_SOURCE_TOKEN_<NAME>` is sent as a bearer token, where it is set.
    """

    def __init__(self, source: Source):
        self._root = f"https://{source.location}/"
        self._headers = {"User-Agent": "tucka", "Accept-Encoding": "identity"}
        if token := os.environ.get(token_variable(source.name)):
            self._headers["Authorization"] = f"Bearer {token}"
        self._opener = urllib.request.build_opener(_SameHost)

    def look(self, path: str) -> RemoteFile:
        with self._ask(path, "HEAD", {}) as answer:
            if answer.headers["Content-Length"] is None:
                raise SourceError("The source does not say how long a file is (Content-Length), so none is fetched.")
            digest = re.search(r"sha-256=:?([A-Za-z0-9+/=]{44})", answer.headers.get("Repr-Digest", ""))
            digests = {"sha256": base64.b64decode(digest[1]).hex()} if digest else {}
            version = answer.headers["ETag"] or answer.headers["Last-Modified"] or ""
            return RemoteFile(int(answer.headers["Content-Length"]), version, digests)

    def read(self, path: str, file: RemoteFile, start: int) -> Iterator[bytes]:
        with self._ask(path, "GET", {"Range": f"bytes={start}-"} if start else {}) as answer:
            if (answer.headers["ETag"] or answer.headers["Last-Modified"] or "") != file.version:
                raise ChangedError
            if start and answer.status != 206:  # it knows no ranges: what is here already is passed over
                _skip(answer, start)
            while piece := answer.read(PIECE_BYTES):
                yield piece

    def _ask(self, path: str, method: str, headers: dict[str, str]) -> HTTPResponse:
        url = self._root + urllib.parse.quote(path)
        request = urllib.request.Request(url, headers=self._headers | headers, method=method)
        try:
            answer: HTTPResponse = self._opener.open(request, timeout=TIMEOUT_SECONDS)
            return answer
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise FileNotFoundError from None
            if error.code in (401, 403):
                raise PermissionError from None
            raise SourceError(f"The source answers {error.code}. Try again later.") from None


def _skip(answer: HTTPResponse, left: int) -> None:
    while left and (piece := answer.read(min(left, PIECE_BYTES))):
        left -= len(piece)


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows a redirect within the host that the operator named, and no other: that may lead into his network."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl)[:2] != urllib.parse.urlsplit(req.full_url)[:2]:
            raise SourceError("The source redirects to another host, which is not followed. Name that as the source.")
        made = super().redirect_request(req, fp, code, msg, headers, newurl)
        if made is not None:
            made.method = req.get_method()  # urllib makes a GET of a HEAD
        return made


class HubReader:
    """The Hugging Face Hub, by way of its cache: what is there is read there where HF_HUB_OFFLINE says so.

    The source is the whole Hub (`hf:`), an organisation, a repository, or a folder in one; a repository may have
    `@revision`. A file of Git LFS goes by its SHA-256 in the cache, and is held against it.
    """

    def __init__(self, source: Source):
        self._root = source.location

    def look(self, path: str) -> RemoteFile:
        file = self._cached(path)
        name = file.name
        return RemoteFile(file.stat().st_size, name, {"sha256": name} if _SHA256.fullmatch(name) else {})

    def read(self, path: str, file: RemoteFile, start: int) -> Iterator[bytes]:
        cached = self._cached(path)
        if cached.name != file.version:
            raise ChangedError
        with cached.open("rb") as data:
            data.seek(start)
            while piece := data.read(PIECE_BYTES):
                yield piece

    def _cached(self, path: str) -> Path:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

        repository, revision, file = _hub_parts(f"{self._root}/{path}" if self._root else path)
        try:
            if not constants.is_offline_mode():
                size = get_hf_file_metadata(hf_hub_url(repository, file, revision=revision)).size
                _check_size(file.rpartition("/")[2], size)
            return Path(hf_hub_download(repository, file, revision=revision)).resolve()
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            raise FileNotFoundError from None


def _hub_parts(path: str) -> tuple[str, str | None, str]:
    """Repository, revision and file of `org/name@revision/folder/file`. Raises InvalidAdapterError."""
    parts = path.split("/")
    if len(parts) < 3:
        raise InvalidAdapterError("the path below this source must name a repository: its organisation and its name.")
    name, _, revision = parts[1].partition("@")
    return f"{parts[0]}/{name}", revision or None, "/".join(parts[2:])


def _check_size(name: str, size: int | None) -> None:
    limit = served_files(defaults=True)[name]
    if size is not None and size > limit:
        raise InvalidAdapterError(f"the adapter's {name} is larger than {limit} bytes.")


def token_variable(name: str) -> str:
    """The environment variable that holds the token of an https: source."""
    return "TUCKA_SOURCE_TOKEN_" + re.sub(r"[^A-Z0-9]", "_", name.upper())
