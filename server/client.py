"""What `tucka adapters` and `tucka top` say to a server."""

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from tucka_runtime.endpoint import KEY_VARIABLES, client_key, server_address
from tucka_runtime.errors import TuckaError

TIMEOUT_SECONDS = 600  # loading a large adapter takes a while


class Client:
    """One server. `api_key` None: the environment's key, if there is one."""

    def __init__(self, url: str, api_key: str | None):
        self._url = server_address(url)
        self._key = client_key(api_key)

    def get(self, path: str) -> bytes:
        return self._call("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        return self._call("POST", path, body)

    def delete(self, path: str) -> bytes:
        return self._call("DELETE", path, None)

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        """The answer's body. Raises TuckaError with what the server or the network says."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._url + path, data, headers, method=method)
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise TuckaError(self._message(error)) from None
        except (urllib.error.URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise TuckaError(f"No answer from {self._url}: {reason}. Is the server running, is --url right?") from None

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


def list_adapters(client: Client) -> int:
    cards = json.loads(client.get("/v1/adapters"))["data"]
    for card in cards:
        detail = card["tucka"]
        shape = " ".join(f"{name}={detail[name]}" for name in "rktp" if detail[name] is not None)
        print(f"{card['id']}  {detail['kind']}  {shape}  generation {detail['generation']}  {detail['digest'][:12]}")
    if not cards:
        print("no adapters are loaded")
    return 0


def load_adapter(client: Client, name: str, path: str, replace: bool) -> int:
    card = json.loads(client.post("/v1/adapters", {"name": name, "path": path, "load_inplace": replace}))
    print(f"{card['id']} is loaded: generation {card['tucka']['generation']}, digest {card['tucka']['digest'][:12]}")
    return 0


def unload_adapter(client: Client, name: str) -> int:
    client.delete(f"/v1/adapters/{urllib.parse.quote(name)}")
    print(f"{name} is unloaded")
    return 0
