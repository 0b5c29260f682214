"""Clients' bodies, mutated at every level, against a server of their own: `python -m tests.chaos.mutations --count N`.

Right is that every answer is one that docs/api.md names: no 5xx but a 503 for what is full, no engine restarted, no
traceback in the log, and memory that is flat: after the first quarter it may grow by --percent. A body whose name was
mutated may load an adapter under it; those are unloaded before the memory is read, for they take some.
"""

import argparse
import contextlib
import copy
import http.client
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.chaos.memory_slope import resident
from tests.support.servers import Server, engine_of, series, start_command
from tucka_runtime.embedded import FOLDER

PARTS = 8
CONTEXT = 128
ADAPTERS = ("formats", "words", "triage", "sql")
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "integer"}}, "required": ["a"]}
FUNCTION = {"name": "get_weather", "description": "Weather.", "parameters": SCHEMA, "strict": True}
HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Weather?"}], "name": "me"},
    {"role": "assistant", "content": None, "refusal": None, "reasoning": "hm", "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"a": "x"}'}}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]  # fmt: skip
OLDER: dict[str, Any] = {"functions": [FUNCTION], "messages": [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "function_call": {"name": "get_weather", "arguments": "{}"}},
    {"role": "function", "name": "get_weather", "content": "sunny"},
]}  # fmt: skip
SAMPLED = {
    "model": "formats", "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "n": 2, "stop": ["\n\n"],
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {"45": 2, "46": -100},
    "stop_token_ids": [3], "max_tokens": 4, "min_tokens": 1, "ignore_eos": False, "skip_special_tokens": True,
    "include_stop_str_in_output": True, "bad_words": ["the", "a b"], "allowed_token_ids": [40, 41, 42],
    "truncate_prompt_tokens": 16, "truncation_side": "right", "cache_salt": "s", "user": "me", "best_of": 2,
    "return_token_ids": True, "include_route": True, "route": "request", "metadata": {"a": "b"},
}  # fmt: skip
ROUTER = {
    "no_stop_trim": False, "separate_reasoning": True, "stream_reasoning": True, "return_hidden_states": False,
    "lora_path": None, "session_params": None, "rid": None, "top_logprobs": 0, "store": True, "echo": False,
}  # fmt: skip
CHAT = {"model": "formats", "messages": [{"role": "user", "content": "2024-03-05"}], "max_tokens": 4}
STREAM = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
SEEDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", SAMPLED | {"prompt": "Hello"}),
    ("/v1/completions", STREAM | {"model": "base", "prompt": ["a", "b"], "max_tokens": 2, "echo": True, "logprobs": 2}),
    ("/v1/completions", {"model": "words", "prompt": [[45, 78], [5]], "max_tokens": 0, "prompt_logprobs": 3}),
    ("/v1/completions", {"model": "sql", "prompt": "x", "max_tokens": 6, "guided_json": SCHEMA, "temperature": 0}),
    ("/v1/completions", {"model": "base", "prompt": "x", "structured_outputs": {"regex": "[a-c]{2}"}, "max_tokens": 6}),
    ("/v1/completions", {"model": "base", "prompt": "x", "guided_grammar": 'root ::= "a" [b-d]+', "max_tokens": 4}),
    ("/v1/completions", {"model": "base", "prompt": "x", "max_tokens": 2, "adapters": [
        {"name": "formats", "weight": 0.5}, {"name": "sql"}]}),
    ("/v1/chat/completions", CHAT | ROUTER | STREAM),
    ("/v1/chat/completions", CHAT | {k: v for k, v in SAMPLED.items() if k != "model"} | {"logprobs": True}),
    ("/v1/chat/completions", {"model": "triage", "messages": HISTORY, "max_tokens": 4, "tool_choice": "required",
                              "tools": [{"type": "function", "function": FUNCTION}], "parallel_tool_calls": False}),
    ("/v1/chat/completions", CHAT | OLDER | {"function_call": {"name": "get_weather"}}),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_schema", "json_schema": {
        "name": "s", "strict": True, "schema": SCHEMA}}}),
    ("/v1/chat/completions", CHAT | {"chat_template_kwargs": {"a": 1}, "add_generation_prompt": True}),
    ("/v1/embeddings", {"model": "formats", "input": ["a", "b"], "encoding_format": "base64", "pooling": "last"}),
    ("/tokenize", {"model": "base", "prompt": "Hi", "return_token_strs": True}),
    ("/tokenize", {"messages": HISTORY, "tools": [{"type": "function", "function": FUNCTION}]}),
    ("/detokenize", {"tokens": [45, 78]}),
    ("/v1/load_lora_adapter", {"lora_name": "again", "lora_path": "words", "load_inplace": True, "lora_int_id": 1}),
    ("/v1/unload_lora_adapter", {"lora_name": "again", "lora_int_id": 1}),
    ("/v1/adapters", {"name": "pinned", "path": "formats", "pinned": {"group": 1, "weights": [0.5, 0.6]}}),
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**63, -(2**63) - 1, 10**19, "", " ", "x", "\0",
    "é😀",
    "<|end|>", "a" * 5000, "\ud800", [], {}, [[]], [None], {"": None}, [0] * 300, {"a": {"a": {"a": []}}}, "^(a|b)*$",
    {"$ref": "#"}, {"type": "object"}, "base", "formats", "required", "{}", "[", "\u2028",
)  # fmt: skip


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all that a body holds."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from nodes(inner, (*path, key))


def mutated(body: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A copy with one to three changes, each anywhere in it."""
    body = copy.deepcopy(body)
    for _ in range(chance.choice((1, 1, 2, 3))):
        paths = list(nodes(body))
        if not paths:
            break
        *before, last = chance.choice(paths)
        holder: Any = body
        for key in before:
            holder = holder[key]
        value = holder[last]
        match chance.randrange(7):
            case 0:
                del holder[last]
            case 1:
                holder[last] = [copy.deepcopy(value)] * chance.choice((1, 2, 40))
            case 2 if isinstance(holder, dict):
                holder[chance.choice(("", "x", "model", "type", str(last) + "s", "a\r\nb"))] = holder.pop(last)
            case 3 if isinstance(value, int | float):
                holder[last] = value * chance.choice((-1, 10, 0.5, 1000)) + chance.choice((0, 1))
            case 4 if isinstance(value, str):
                at = chance.randrange(len(value) + 1)
                holder[last] = value[:at] + str(chance.choice(ODD)) + value[at:]
            case 5:
                other: Any = body
                for key in chance.choice(paths[:20]):
                    other = other[key] if not isinstance(other, dict) or key in other else None
                    if not isinstance(other, dict | list):
                        break
                holder[last] = copy.deepcopy(other)
            case _:
                holder[last] = copy.deepcopy(chance.choice(ODD))
    return body


class Client:
    """One of several, with a connection and a random stream of its own. `faults` are shared, and end the trial."""

    def __init__(self, server: Server, seed: int, faults: list[str]):
        self.server, self.chance, self.faults = server, random.Random(seed), faults
        self.answers: Counter[str] = Counter()
        self.connection = http.client.HTTPConnection(*server.address, timeout=120)

    def send(self, count: int) -> None:
        for _ in range(count):
            if self.faults:
                return
            path, seed = self.chance.choice(SEEDS)
            body = mutated(seed, self.chance)
            content = json.dumps(body, ensure_ascii=self.chance.random() < 0.5).encode("utf-8", "surrogatepass")
            try:
                self.connection.request("POST", path, content, {"Content-Type": "application/json"})
                answer = self.connection.getresponse()
                self._judge(path, content, answer.status, answer.read())
            except (OSError, http.client.HTTPException) as error:
                self.faults.append(f"{path}: {error!r} to {content[:2000]!r}")

    def _judge(self, path: str, content: bytes, status: int, answer: bytes) -> None:
        self.answers[str(status)] += 1
        full = status == 503 and json.loads(answer)["error"]["code"] == "adapter_capacity"
        broken = b'"type":"server_error"' in answer.replace(b": ", b":") and status == 200
        if (status >= 500 and not full) or broken:
            self.faults.append(f"{path}: {status} {answer[-300:]!r} to {content[:2000]!r}")


def trial(count: int, threads: int, seed: int) -> tuple[Counter[str], list[str], list[float]]:
    """Returns how often each status was answered, what went wrong, and the two processes' memory in MiB after each
    part."""
    faults: list[str] = []
    answers: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        log = Path(folder) / "log"
        adapters = [f"{name}={FOLDER / 'adapters' / name}" for name in ADAPTERS]
        named = [word for adapter in adapters for word in ("--adapter", adapter)]
        roots = ("--adapter-root", str(FOLDER / "adapters"), "--max-model-len", str(CONTEXT))
        process, url = start_command(*named, *roots, log=log)
        stack.callback(process.wait, 60)
        stack.callback(process.terminate)
        server = Server(url, process.pid)
        engine, begun, memory = engine_of(process.pid), time.monotonic(), []
        clients = [Client(server, 1000 * seed + i, faults) for i in range(threads)]
        for part in range(PARTS):
            share = (count * (part + 1) // PARTS - count * part // PARTS) // threads
            running = [threading.Thread(target=client.send, args=(share,)) for client in clients]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
            for card in server.get("/v1/adapters").json()["data"]:
                if card["id"] not in ADAPTERS:
                    server.client.delete(f"{server.url}/v1/adapters/{card['id']}").raise_for_status()
            memory.append(resident(process.pid) + resident(engine))
            answers = sum((client.answers for client in clients), Counter())
            print(f"{answers.total():8} answers {memory[-1]:8.1f} MiB {time.monotonic() - begun:6.0f} s", flush=True)
            if faults:
                break
        if restarts := sum(value for name, value in series(server).items() if "engine_restarts" in name):
            faults.append(f"the engine was restarted {restarts:.0f} times")
        if "Traceback" in (said := log.read_text()):
            faults.append(said[said.find("Traceback") :][:8000][-3000:])
    return answers, faults, memory


def main(given: list[str] | None = None) -> int:
    """Returns 1 where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--percent", type=float, default=3.0, help="growth after the first quarter that is a fault")
    flags = parser.parse_args(given)
    answers, faults, memory = trial(flags.count, flags.threads, flags.seed)
    grown = 100 * (memory[-1] / memory[min(PARTS // 4, len(memory)) - 1] - 1)
    print(dict(sorted(answers.items())), f"memory after the first quarter {grown:+.2f}%")
    for fault in faults:
        print(fault)
    return int(bool(faults) or grown > flags.percent)


if __name__ == "__main__":
    sys.exit(main())
