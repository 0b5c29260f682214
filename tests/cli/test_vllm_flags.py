"""`vllm serve`'s command lines, as controllers render them, are this server's."""

import argparse

import pytest

from tucka_runtime.cli import healthcheck, settings
from tucka_runtime.cli.vllm_flags import translate
from tucka_runtime.config import EngineConfig, ServerConfig

# What KServe's controller puts before a user's arguments (addLoRAVLLMArgs), behind what its template says.
KSERVE = [
    "/mnt/models", "--served-model-name", "llama", "publishers/ns/models/llama", "--port", "8000",
    "--disable-access-log-for-endpoints", "/health,/metrics,/ping", "--shutdown-timeout", "15",
    "--enable-lora", "--max-lora-rank=64", "--max-loras=2", "--max-cpu-loras=4", "--lora-modules",
    """'{"name":"a","path":"/mnt/lora/a"}'""", """'{"name":"publishers/ns/models/a","path":"/mnt/lora/a"}'""",
    "--max-model-len", "4096",
]  # fmt: skip
# AIBrix's sample of a base model for adapters, whose container calls `vllm serve` with --model.
AIBRIX = [
    "--host", "0.0.0.0", "--port", "8000", "--uvicorn-log-level", "warning", "--model", "Qwen/Qwen2.5-Coder-1.5B",
    "--served-model-name", "qwen", "--enable-lora", "--max-loras", "4", "--max-cpu-loras", "4",
]  # fmt: skip


def configs(arguments: list[str]) -> tuple[EngineConfig, ServerConfig]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    settings.add_flags(parser)
    return settings.read_settings(vars(parser.parse_args(translate(arguments)[0])), {})


def test_kserves_command_line() -> None:
    engine, server = configs(KSERVE)
    assert (engine.model, engine.adapter_slots, engine.max_model_len) == ("/mnt/models", 2, 4096)
    assert server.served_model_name == ("llama", "publishers/ns/models/llama")
    assert (server.port, server.shutdown_timeout) == (8000, 15)
    assert server.adapter == ("a=/mnt/lora/a", "publishers/ns/models/a=/mnt/lora/a")
    lines = translate(KSERVE)[1]
    assert [line.split(" became")[0].split(" has")[0] for line in lines] == [
        "the model that stands before the flags", "--served-model-name", "--disable-access-log-for-endpoints",
        "--enable-lora", "--max-lora-rank", "--max-loras", "--max-cpu-loras", "--lora-modules",
    ]  # fmt: skip
    assert lines[1].endswith("one for each of llama, publishers/ns/models/llama") and "--adapter-slots 2" in lines[5]


def test_aibrixs_command_line() -> None:
    engine, server = configs(AIBRIX)
    assert (engine.model, engine.adapter_slots) == ("Qwen/Qwen2.5-Coder-1.5B", 4)
    assert (server.host, server.port, server.served_model_name, server.adapter) == ("0.0.0.0", 8000, ("qwen",), ())


@pytest.mark.parametrize(
    "written",
    [
        ["--lora-modules", "law=/a/law", "fin=/a/fin"],
        ["--lora_modules", "law=/a/law", '{"name": "fin", "path": "/a/fin", "base_model_name": "llama"}'],
        ["--lora-modules=law=/a/law", "--lora-modules", "fin=/a/fin"],
        ["--adapter", "law=/a/law", "--adapter=fin=/a/fin"],
    ],
)
def test_every_way_to_name_adapters(written: list[str]) -> None:
    assert configs([*written, "--seed", "-1"])[1].adapter == ("law=/a/law", "fin=/a/fin")


def test_other_names_of_the_same() -> None:
    assert configs(["--dtype", "half"])[0].dtype == "float16"
    assert configs(["--dtype=bfloat16", "--tensor-parallel-size", "1"])[0].dtype == "bfloat16"


def test_our_own_command_line_is_left_alone() -> None:
    own = ["--model", "/m", "--adapter", "a=/a", "--port=0", "--no-console", "--served-model-name", "x", "--seed", "-3"]
    assert translate(own) == (own, [])


def test_the_image_finds_its_port_behind_them() -> None:
    assert healthcheck.url(["tucka", "serve", *KSERVE, "--dtype", "half"]) == "http://127.0.0.1:8000/ready"
