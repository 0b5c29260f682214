"""inference-perf: its split of traffic over LoRA adapters."""

import json
import re
import tempfile
import urllib.request
from pathlib import Path

from checks import BASE, URL, check, command, same

SHARES = {"formats": 0.75, "words": 0.25}


def requests_by_adapter() -> dict[str, float]:
    """What the server says that it served to each adapter until now."""
    text = urllib.request.urlopen(f"{URL}/metrics", timeout=60).read().decode()
    found = dict.fromkeys(SHARES, 0.0)
    for labels, value in re.findall(r"^tucka_adapter_requests_total\{(.*)\} (\S+)$", text, re.MULTILINE):
        name = re.search(r'model="(\w+)"', labels)
        if name and name[1] in found:
            found[name[1]] += float(value)
    return found


@check("10 s of random prompts, streamed, split over two adapters (lora_traffic_split)")
def _() -> None:
    before = requests_by_adapter()
    with tempfile.TemporaryDirectory() as folder:
        lengths = {"min": 12, "max": 12, "mean": 12, "std_dev": 0, "total_count": 40}
        config = {
            "api": {"type": "completion", "streaming": True},
            "data": {"type": "random", "input_distribution": lengths, "output_distribution": lengths},
            "load": {
                "type": "constant", "stages": [{"rate": 2, "duration": 10}], "num_workers": 1,
                "lora_traffic_split": [{"name": name, "split": share} for name, share in SHARES.items()],
            },
            "server": {"type": "vllm", "model_name": "base", "base_url": URL, "ignore_eos": True},
            "tokenizer": {"pretrained_model_name_or_path": BASE},
            "storage": {"local_storage": {"path": f"{folder}/out"}},
            "report": {"prometheus": None},
        }  # fmt: skip
        # JSON is YAML.
        (Path(folder) / "config.yml").write_text(json.dumps(config))
        command("inference-perf", "--config_file", f"{folder}/config.yml", folder=Path(folder), HF_HUB_OFFLINE="1")
        summary = json.loads((Path(folder) / "out" / "summary_lifecycle_metrics.json").read_text())
    same(summary["failures"]["count"], 0)
    served = {name: count - before[name] for name, count in requests_by_adapter().items()}
    same(sum(served.values()), summary["successes"]["count"])
    assert min(served.values()) > 0, served
