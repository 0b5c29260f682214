"""Sends a trained adapter to a running server, and checks before the training that it will be let in."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from tucka_runtime.adapters.files import CONFIG_NAME, FILE_LIMITS
from tucka_runtime.client import Client
from tucka_runtime.errors import ConfigError, TuckaError


@dataclass(frozen=True)
class Publication:
    """Where an adapter goes: a server and the name there; and the folder that it is in."""

    url: str
    name: str
    folder: Path
    api_key: str | None
    replace: bool

    def check(self) -> None:
        """Raises ConfigError where the server is not reached or would refuse the adapter whatever is in it.

        The server is sent an adapter without files: what it says shows whether it knows the key and allows the name.
        """
        client = Client(self.url, self.api_key)
        try:
            taken = {card["id"] for card in json.loads(client.get("/v1/adapters"))["data"]}
            client.upload(self.name, self.folder, (), replace=False)
        except TuckaError as error:
            if CONFIG_NAME not in error.message:
                raise ConfigError(f"--publish {self.url}: {error.message}") from error
        if self.name in taken and not self.replace:
            raise ConfigError(
                f"--publish {self.url}: an adapter {self.name} is loaded there. Give another --name, or --replace."
            )

    def publish(self) -> None:
        """Raises ConfigError with the server's answer, and the command that does the same again."""
        try:
            Client(self.url, self.api_key).upload(self.name, self.folder, FILE_LIMITS, self.replace)
        except TuckaError as error:
            words = ["tucka", "adapters", "upload", self.name, str(self.folder.resolve()), "--url", self.url]
            if self.replace or "--replace" in error.message:  # another took the name meanwhile
                words.append("--replace")
            raise ConfigError(
                f"The adapter is in {self.folder}, but it was not published: {error.message}\n"
                f"To publish it{', with the same --api-key' if self.api_key else ''}: {shlex.join(words)}"
            ) from error
