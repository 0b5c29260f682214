"""Where a server is and what opens it, as the command-line clients are told: `tucka adapters`, `top`, `loadtest`."""

import os

KEY_VARIABLES = ("TUCKA_CLIENT_KEY", "OPENAI_API_KEY")


def server_address(url: str) -> str:
    """http:// where no scheme is named; without the slash or the /v1 that OpenAI's clients want at the end."""
    url = url if "://" in url else f"http://{url}"
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def client_key(given: str | None) -> str | None:
    """The key to send: the one given, else the environment's, the first of KEY_VARIABLES that is set."""
    return given or next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
