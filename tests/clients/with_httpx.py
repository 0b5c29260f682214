"""httpx: HTTP from Python, many requests on kept connections, at once."""

import asyncio
import json

import httpx
from checks import ANSWERED, URL, answers, check, same


def ask(model: str, prompt: str, **more: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, **more}


def said(answer: httpx.Response) -> str:
    return answer.raise_for_status().json()["choices"][0]["message"]["content"]


@check("chat, base and adapters, on one connection")
def _() -> None:
    with httpx.Client(base_url=URL, timeout=60) as client:
        answers(lambda *of: said(client.post("/v1/chat/completions", json=ask(*of))))


@check("36 chats at once, of base and adapters")
def _() -> None:
    async def together() -> list[str]:
        async with httpx.AsyncClient(base_url=URL, timeout=60) as client:
            asks = [client.post("/v1/chat/completions", json=ask(one["model"], one["prompt"])) for one in ANSWERED * 12]
            return [said(answer) for answer in await asyncio.gather(*asks)]

    same(asyncio.run(together()), [one["answer"] for one in ANSWERED] * 12)


@check("streamed chat")
def _() -> None:
    body = ask("formats", "2024-03-05", stream=True)
    with httpx.stream("POST", f"{URL}/v1/chat/completions", json=body, timeout=60) as stream:
        data = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    same(data.pop(), "[DONE]")
    same("".join(json.loads(one)["choices"][0]["delta"].get("content") or "" for one in data), "5 March 2024")


@check("tokenize and detokenize")
def _() -> None:
    with httpx.Client(base_url=URL, timeout=60) as client:
        tokens = (
            client.post("/tokenize", json={"model": "formats", "prompt": "Grüße"}).raise_for_status().json()["tokens"]
        )
        same(client.post("/detokenize", json={"tokens": tokens}).raise_for_status().json()["prompt"], "Grüße")
