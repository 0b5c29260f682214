"""Open WebUI before the server: its own API, as its pages use it, signed in as its first user."""

import json
import tempfile

import httpx
from checks import ASKS, URL, answers, check, same
from proxied import free_port, started

port = free_port()
settings = {
    "OPENAI_API_BASE_URL": f"{URL}/v1",
    "OPENAI_API_KEY": "none",
    "ENABLE_OLLAMA_API": "False",
    "RAG_EMBEDDING_ENGINE": "openai",
    "RAG_OPENAI_API_BASE_URL": f"{URL}/v1",
    "RAG_EMBEDDING_MODEL": "base",
    "HF_HUB_OFFLINE": "1",
    "WEBUI_SECRET_KEY": "of-this-run",
}


def asked(model: str, prompt: str, stream: bool) -> dict[str, object]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "temperature": 0, "stream": stream}


def chats(client: httpx.Client) -> None:
    @check("models through it")
    def _() -> None:
        models = client.get("/api/models").raise_for_status().json()["data"]
        assert {"base", "formats", "words"} <= {model["id"] for model in models}

    @check("chat, base and adapters")
    def _() -> None:
        def ask(model: str, prompt: str) -> str:
            answer = client.post("/api/chat/completions", json=asked(model, prompt, False)).raise_for_status().json()
            return answer["choices"][0]["message"]["content"]

        answers(ask)

    @check("streamed chat")
    def _() -> None:
        one = ASKS["formats"]
        with client.stream("POST", "/api/chat/completions", json=asked(one["model"], one["prompt"], True)) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
        same(lines.pop(), "[DONE]")
        deltas = [choice["delta"] for line in lines for choice in json.loads(line)["choices"]]
        same("".join(delta.get("content") or "" for delta in deltas), one["answer"])

    @check("embeddings, of a text that is put into its knowledge")
    def _() -> None:
        text = {"name": "note.txt", "content": "The meeting is on 5 March.", "collection_name": "notes"}
        same(client.post("/api/v1/retrieval/process/text", json=text).raise_for_status().json()["status"], True)
        query = {"collection_name": "notes", "query": "When is the meeting?", "k": 1}
        found = client.post("/api/v1/retrieval/query/doc", json=query).raise_for_status().json()
        same(found["documents"], [[text["content"]]])


words = ["open-webui", "serve", "--host", "127.0.0.1", "--port", str(port)]
with (
    tempfile.TemporaryDirectory() as folder,
    started(words, f"http://127.0.0.1:{port}/health", seconds=300, DATA_DIR=folder, **settings),
    httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
):
    user = {"name": "first", "email": "first@example.com", "password": "of-this-run-1"}
    signed = client.post("/api/v1/auths/signup", json=user).raise_for_status().json()
    client.headers["authorization"] = f"Bearer {signed['token']}"
    chats(client)
