"""Loads a trained adapter into a running server, and checks before the training that it will be let in."""

import json
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tucka_runtime.adapters.files import CONFIG_NAME
from tucka_runtime.client import Client
from tucka_runtime.errors import ConfigError, TuckaError


@dataclass(frozen=True)
class Publication:
    """Where an adapter goes: a server, the name there, and the folder as this machine sees it."""

    url: str
    name: str
    folder: Path
    api_key: str | None
    replace: bool

    def check(self) -> None:
        """Raises ConfigError where the server is not reached or would refuse the adapter whatever is in it.

        The server is asked to load an empty folder beside the adapter's files: what it says shows whether it knows the
        key, allows the name and sees the folder below an --adapter-root.
        """
        client = Client(self.url, self.api_key)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(prefix=".publish-", dir=self.folder) as empty:
                try:
                    taken = {card["id"] for card in json.loads(client.get("/v1/adapters"))["data"]}
                    client.post("/v1/load_lora_adapter", {"lora_name": self.name, "lora_path": self._path(Path(empty))})
                except TuckaError as error:
                    if CONFIG_NAME not in error.message:
                        raise ConfigError(f"--publish {self.url}: {error.message}") from error
        finally:
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
        if self.name in taken and not self.replace:
            raise ConfigError(
                f"--publish {self.url}: an adapter {self.name} is loaded there. Give another --name, or --replace."
            )

    def publish(self) -> None:
        """Raises ConfigError with the server's answer, and the command that does the same again."""
        body = {"lora_name": self.name, "lora_path": self._path(self.folder), "load_inplace": self.replace}
        try:
            Client(self.url, self.api_key).post("/v1/load_lora_adapter", body)
        except TuckaError as error:
            words = ["tucka", "adapters", "load", self.name, self._path(self.folder), "--url", self.url]
            if self.replace or "--replace" in error.message:  # another took the name meanwhile
                words.append("--replace")
            raise ConfigError(
                f"The adapter is in {self.folder}, but it was not published: {error.message}\n"
                f"To publish it{', with the same --api-key' if self.api_key else ''}: {shlex.join(words)}"
            ) from error

    def _path(self, folder: Path) -> str:
        return str(folder.resolve())
