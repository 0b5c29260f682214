"""What the command line says to a server, and how it is told where that is and what opens it."""

import http.client
import ipaddress
import json
import os
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tucka_runtime.errors import TuckaError

KEY_VARIABLES = ("TUCKA_CLIENT_KEY", "OPENAI_API_KEY")
PIECE_BYTES = 2**20  # of a file that are in memory at once
TIMEOUT_SECONDS = 600  # loading a large adapter takes a while


def server_address(url: str) -> str:
    """http:// where no scheme is named; without the slash or the /v1 that OpenAI's clients want at the end."""
    url = url if "://" in url else f"http://{url}"
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def client_key(given: str | None) -> str | None:
    """The key to send: the one given, else the environment's, the first of KEY_VARIABLES that is set."""
    return given or next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)


def _is_here(url: str) -> bool:
    """Whether the address is this machine's loopback."""
    try:
        host = urllib.parse.urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or no address at all
        return False


class Client:
    """One server. `api_key` None: the environment's key, if there is one."""

    def __init__(self, url: str, api_key: str | None):
        self._url = server_address(url)
        self._key = client_key(api_key)
        # A proxy that the environment names is for other machines: this one's loopback is another to it.
        proxies = urllib.request.ProxyHandler({} if _is_here(self._url) else None)
        self._opener = urllib.request.build_opener(proxies)

    def get(self, path: str) -> bytes:
        return self._call("GET", path, None, {})

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        return self._call("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def delete(self, path: str) -> bytes:
        return self._call("DELETE", path, None, {})

    def upload(self, name: str, folder: Path, files: Iterable[str], replace: bool) -> bytes:
        """Sends those of `files` that the folder has as the adapter `name`. Raises TuckaError where one cannot be read.

        They go as multipart/form-data, piece by piece: an adapter may be larger than this machine's memory.
        """
        boundary = uuid.uuid4().hex
        parts: list[bytes | Path] = []
        for file in files:
            if (folder / file).is_file():
                disposition = f'Content-Disposition: form-data; name="file"; filename="{file}"'
                parts += [f"--{boundary}\r\n{disposition}\r\n\r\n".encode(), folder / file, b"\r\n"]
        parts.append(f"--{boundary}--\r\n".encode())
        try:
            length = sum(len(part) if isinstance(part, bytes) else part.stat().st_size for part in parts)
            headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Content-Length": str(length)}
            path = f"/v1/adapters/{urllib.parse.quote(name)}?load_inplace={json.dumps(replace)}"
            return self._call("PUT", path, _pieces(parts), headers)
        except OSError as error:
            raise TuckaError(f"{error.filename or folder} cannot be read: {error.strerror}.") from None

    def _call(self, method: str, path: str, data: bytes | Iterable[bytes] | None, headers: dict[str, str]) -> bytes:
        """The answer's body. Raises TuckaError with what the server or the network says."""
        if self._key:
            headers = headers | {"Authorization": f"Bearer {self._key}"}
        try:
            request = urllib.request.Request(self._url + path, data, headers, method=method)
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
                read: bytes = answer.read()
                return read
        except urllib.error.HTTPError as error:
            raise TuckaError(self._message(error)) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise TuckaError(
                f"No answer from {self._url}: {reason}. Is the server running, is the address right?"
            ) from None

    def _message(self, error: urllib.error.HTTPError) -> str:
        """What the server says, in the command line's terms where it speaks of HTTP's."""
        if error.code == 401:
            wrong = "does not know this API key" if self._key else "wants an API key"
            return f"The server {wrong}. Give one of its keys with --api-key or in {' or '.join(KEY_VARIABLES)}."
        try:
            message = str(json.loads(error.read())["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return f"The server answered {error.code} {error.reason}."
        return message.replace("`load_inplace: true`", "--replace")


def _pieces(parts: Iterable[bytes | Path]) -> Iterator[bytes]:
    """The bytes, and those of the files."""
    for part in parts:
        if isinstance(part, bytes):
            yield part
            continue
        with part.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece
