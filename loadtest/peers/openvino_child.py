"""OpenVINO GenAI's continuous batching, alone: run by the Python that has it, never imported.

    python openvino_child.py FOLDER        a model exported by optimum-intel

Says on a line of JSON what it is, then answers each line of standard input, `{"sequences": 8, "prompt": 64,
"new": 128}`, with the seconds that so many answers took, all at once. It ends with its input.
"""

import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import openvino
import openvino_genai


def main() -> None:
    folder = Path(sys.argv[1])
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1  # GiB
    scheduler.max_num_seqs = 64
    scheduler.max_num_batched_tokens = 2048
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU")
    precision = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    say({"openvino-genai": openvino_genai.__version__, "openvino": openvino.__version__, "precision": precision})
    for line in sys.stdin:
        asked = json.loads(line)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = asked["new"], True, False
        prompts = [
            openvino.Tensor(np.array([[random.randrange(10, vocab) for _ in range(asked["prompt"])]], dtype=np.int64))
            for _ in range(asked["sequences"])
        ]
        begin = time.perf_counter()
        answers = pipeline.generate(prompts, [config] * len(prompts))
        seconds = time.perf_counter() - begin
        made = sum(len(answer.m_generation_ids[0]) for answer in answers)
        say({"seconds": seconds, "tokens": made})


def say(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
