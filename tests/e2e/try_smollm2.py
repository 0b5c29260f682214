"""A real base in a GGUF file: what `tucka serve --model FILE` answers in chats, beside transformers on that file.

    python -m tests.e2e.try_smollm2 demo/SmolLM2-135M-Instruct.Q4_1.gguf

Greedy answers in float32, which have to be the same tokens. Not among the tests: the file has 98 MB, and the package
that it is of compiles another server when it is installed; `trainer/experiments/smollm2.py` fetches it.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar

from tests.support.servers import start_command
from tucka_runtime.bases import find_base

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "List three uses of a paper clip.",
    "Translate to German: Good morning, my friend.",
    "What is 17 + 25? Explain in one sentence.",
    "Who wrote Hamlet?",
    "Give me a name for a bakery.",
    "Why is the sky blue?",
    "Turn into JSON: Ann is 30 and lives in Oslo.",
    "Explain photosynthesis to a child.",
    "Finish: Once upon a time, in 2024,",
    "Name the days of the week.",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--max-tokens", type=int, default=24)
    args = parser.parse_args()
    find_base(args.file, "float32", say=print)  # before the server, which is waited for some minutes alone
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        process, url = start_command("--model", str(args.file), "--dtype", "float32", log=work / "log")
        try:
            answers = [_ask(url, question, args.max_tokens) for question in QUESTIONS]
        finally:
            process.terminate()
            process.wait()
        print(*(line for line in (work / "log").read_text().splitlines() if "dequantis" in line), sep="\n")
    disable_progress_bar()
    same = 0
    place = {"pretrained_model_name_or_path": args.file.parent, "gguf_file": args.file.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    for question, (ids, text) in zip(QUESTIONS, answers, strict=True):
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        start = len(prompt)
        with (
            torch.no_grad()
        ):  # greedy decoding says the same exactly when each token is the likeliest behind the others
            logits = model(torch.tensor([[*prompt, *ids[:-1]]])).logits[0, start - 1 :]
        right = bool(ids) and logits.argmax(-1).tolist() == ids
        same += right
        print(f"{'same ' if right else 'OTHER'}  {question}  {text!r}", flush=True)
    print(f"{same} of {len(QUESTIONS)} greedy answers are those of transformers, token for token")
    return 0 if same == len(QUESTIONS) else 1


def _ask(url: str, question: str, longest: int) -> tuple[list[int], str]:
    body = {
        "model": httpx.get(f"{url}/v1/models").json()["data"][0]["id"], "max_tokens": longest, "temperature": 0,
        "messages": [{"role": "user", "content": question}], "return_token_ids": True,
    }  # fmt: skip
    choice = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).raise_for_status().json()["choices"][0]
    return choice["token_ids"], choice["message"]["content"]


if __name__ == "__main__":
    sys.exit(main())
