"""OpenVINO GenAI's continuous batching, alone: run by the Python that has it, never imported.

    python openvino_child.py FOLDER        a model exported by optimum-intel

Says on a line of JSON what it is, then answers each line of standard input, `{"sequences": 8, "prompt": 64,
"new": 128, "adapters": []}`, with the seconds that so many answers took. Adapters are folders in PEFT's layout. With
none or one all sequences are answered at once; with several, which it does not mix in a batch, one after another, each
with the next of them. It ends with its input.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai


def main() -> None:
    folder = Path(sys.argv[1])
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    precision = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    say({"openvino-genai": openvino_genai.__version__, "openvino": openvino.__version__, "precision": precision})
    pipelines: dict[tuple[str, ...], Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        names = asked["adapters"]
        if tuple(names) not in pipelines:
            loaded = [openvino_genai.Adapter(str(Path(name) / "adapter_model.safetensors")) for name in names]
            pipelines[tuple(names)] = pipeline_with(folder, loaded), loaded
        pipeline, loaded = pipelines[tuple(names)]
        prompts = [
            openvino.Tensor(np.array([[random.randrange(10, vocab) for _ in range(asked["prompt"])]], dtype=np.int64))
            for _ in range(asked["sequences"])
        ]
        turns = [[prompt] for prompt in prompts] if len(names) > 1 else [prompts]
        begin = time.perf_counter()
        made = 0
        for number, turn in enumerate(turns):
            own = loaded[number % len(loaded)] if loaded else None
            answers = pipeline.generate(turn, [generation(asked["new"], own)] * len(turn))
            made += sum(len(answer.m_generation_ids[0]) for answer in answers)
        say({"seconds": time.perf_counter() - begin, "tokens": made})


def pipeline_with(folder: Path, adapters: list[Any]) -> Any:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1  # GiB
    scheduler.max_num_seqs = 64
    scheduler.max_num_batched_tokens = 2048
    scheduler.enable_prefix_caching = False
    known = {"adapters": openvino_genai.AdapterConfig(adapters)} if adapters else {}
    return openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", known)


def generation(new: int, adapter: Any) -> Any:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
    if adapter is not None:
        config.adapters = openvino_genai.AdapterConfig(adapter)
    return config


def say(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
