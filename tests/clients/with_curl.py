"""curl: plain HTTP, as the pages' examples have it."""

import json

from checks import ASKS, CITIES, TOOL, URL, answers, check, command, fits, same


def post(path: str, body: dict[str, object], *flags: str) -> str:
    return command(
        "curl", "-sS", "--fail-with-body", *flags, URL + path, "-H", "Content-Type: application/json",
        "-d", json.dumps(body), timeout=60,
    )  # fmt: skip


def ask(model: str, prompt: str, **more: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, **more}


@check("models")
def _() -> None:
    models = json.loads(command("curl", "-sS", "--fail", f"{URL}/v1/models", timeout=60))["data"]
    assert {"base", "formats", "words"} <= {model["id"] for model in models}


@check("chat, base and adapters")
def _() -> None:
    answers(lambda *of: json.loads(post("/v1/chat/completions", ask(*of)))["choices"][0]["message"]["content"])


@check("streamed chat")
def _() -> None:
    lines = post("/v1/chat/completions", ask("formats", "2024-03-05", stream=True), "-N").splitlines()
    data = [line.removeprefix("data: ") for line in lines if line]
    same(data.pop(), "[DONE]")
    same(
        "".join(json.loads(one)["choices"][0]["delta"].get("content") or "" for one in data), ASKS["formats"]["answer"]
    )


@check("a JSON schema")
def _() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "ticket", "schema": ASKS["schema"]}}
    answer = json.loads(post("/v1/chat/completions", ask("base", "x", response_format=form)))
    fits(json.loads(answer["choices"][0]["message"]["content"]))


@check("a required tool call")
def _() -> None:
    tools = [{"type": "function", "function": TOOL}]
    answer = json.loads(post("/v1/chat/completions", ask("base", "Oslo?", tools=tools, tool_choice="required")))
    (call, *_) = answer["choices"][0]["message"]["tool_calls"]
    same(call["function"]["name"], TOOL["name"])
    assert json.loads(call["function"]["arguments"])["city"] in CITIES


@check("an error has its status")
def _() -> None:
    said = command(
        "curl", "-sS", "-w", "%{http_code}", f"{URL}/v1/completions", "-d", '{"model": "nobody", "prompt": "x"}',
        timeout=60,
    )  # fmt: skip
    body, status = said[:-3], said[-3:]
    same((status, json.loads(body)["error"]["code"]), ("404", "model_not_found"))
