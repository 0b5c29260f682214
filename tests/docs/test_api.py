"""docs/api.md names every route, field, error code and setting, and no others."""

import inspect
import re
from dataclasses import fields
from types import SimpleNamespace

from tests.support import ROOT
from tucka_runtime import errors
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.server.api import anthropic_bodies, app, console, conversation, reading
from tucka_runtime.server.api import bodies as protocol
from tucka_runtime.server.api.response_body import ResponseBody
from tucka_runtime.server.http import errors as http_errors
from tucka_runtime.server.http import keys as auth
from tucka_runtime.server.http.access import Keys
from tucka_runtime.server.metrics.metrics import Metrics

TEXT = (ROOT / "docs" / "api.md").read_text()


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def cells(title: str, column: int) -> list[str]:
    """Of the section's tables."""
    return [line.split(" | ")[column] for line in section(title).splitlines() if re.match(r"\| [^|]", line)]


def names(title: str) -> set[str]:
    return {name for cell in cells(title, 0) for name in re.findall(r"`(\w+)`", cell)}


def routes() -> set[str]:
    metrics = Metrics()
    service = SimpleNamespace(config=ServerConfig(), metrics=metrics, keys=Keys(ServerConfig(), metrics.keys))
    made = app.create_app(service)._app._app._app  # type: ignore[arg-type, attr-defined]
    return {
        f"{method} {route.path.replace(':path', '')}" for route in made.routes for method in route.methods - {"HEAD"}
    }


def test_every_route_is_named_with_its_key() -> None:
    rows = {
        route: key
        for routes, key in zip(cells("Routes", 0), cells("Routes", 1), strict=True)
        for route in re.findall(r"`([A-Z]+ [^`]+)`", routes)
    }
    assert set(rows) == routes()
    for route, key in rows.items():
        path = route.split()[1]
        is_open = path in auth.PROBES or path.startswith(console.FOLDER)
        expected = "none" if is_open else auth.role_of(path) or "any"
        assert key == expected, route


def test_every_field_of_a_generation_is_named() -> None:
    answered = {"finish_reason", "stop_reason", "usage", "cached_tokens", "route", "system_fingerprint"}
    named = names("Completions and chat") - answered
    kinds = (protocol.CompletionBody, protocol.ChatBody)
    acted_upon = {name for kind in kinds for name in kind.model_fields.keys() - kind.ignored}
    assert named == acted_upon - {"route"} and "| `route` |" in section("Completions and chat")


def test_every_other_field_is_named() -> None:
    for title, bodies in {
        "Adapters": (protocol.LoadAdapterBody, protocol.LoadLoraBody, protocol.UnloadLoraBody),
        "Embeddings": (protocol.EmbeddingBody,),
        "Tokenizer": (protocol.TokenizePromptBody, protocol.TokenizeMessagesBody, protocol.DetokenizeBody),
        "Messages": (anthropic_bodies.MessagesBody, anthropic_bodies.CountTokensBody),
    }.items():
        for body in bodies:
            for name in body.model_fields.keys() - conversation.TemplateFields.ignored:
                name = body.model_fields[name].alias or name
                assert f"`{name}`" in section(title), name


def test_every_field_of_a_response_is_named() -> None:
    """Those that it has from chat are named there."""
    fields, chat = ResponseBody.model_fields.keys(), protocol.ChatBody
    missing = (chat.model_fields.keys() - chat.ignored) - (fields - ResponseBody.ignored)
    own = fields - chat.model_fields.keys() | ResponseBody.ignored - chat.ignored | missing - {"messages"}
    text = section("Responses")
    assert not [name for name in own if f"`{name}`" not in text]
    named = names("Responses") - {"role", "content", "function_call", "function_call_output", "reasoning"}
    assert named <= fields and ResponseBody.ignored <= named | names("Fields without effect") | set(
        re.findall(r"`(\w+)`", text.split("These change nothing:")[1]) + list(reading._ELSEWHERE)
    )


def test_every_field_without_effect_is_named() -> None:
    ignored = protocol.CompletionBody.ignored | protocol.ChatBody.ignored
    elsewhere = reading._ELSEWHERE.keys() & ignored
    assert names("Fields without effect") == ignored - elsewhere
    text = section("Fields without effect")
    assert all(f"`{name}`" in text for name in elsewhere | conversation.Unspoken.ignored - {"audio", "function_call"})


def test_every_error_code_is_named_with_its_status() -> None:
    kinds = [
        kind
        for module in (errors, http_errors)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, errors.TuckaError) and kind.code
    ]
    named = re.findall(r"^\| (\d+) \| `(\w+)` \|", section("Errors"), re.MULTILINE)
    assert {(int(status), code) for status, code in named} == {(kind.status, kind.code) for kind in kinds}


def test_every_setting_that_is_named_exists() -> None:
    known = {"--" + field.name.replace("_", "-") for kind in (EngineConfig, ServerConfig) for field in fields(kind)}
    assert set(re.findall(r"`(--[a-z-]+)", TEXT)) <= known | {"--no-docs"}
