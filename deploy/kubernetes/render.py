"""Writes deploy/kubernetes/plain: the chart rendered with its defaults, each optional part on and in a file of its own.

Helm's own engine renders, from the Python package helm-python-sdk: `.venv/bin/python deploy/kubernetes/render.py`.
"""

from pathlib import Path

import helm_python

HERE = Path(__file__).parent
PLAIN = HERE / "plain"
OPTIONAL = ("gateway", "monitoring", "network")
"""Parts that change no other's file."""


def rendered(values: dict[str, object]) -> dict[str, str]:
    """What the chart makes of these values beside its defaults: manifests by their template's name, but empty ones."""
    with helm_python.Chart.load(HERE / "chart") as chart:
        made = chart.render(values, name="tucka", namespace="default")
    return {Path(path).name: text.strip() + "\n" for path, text in made.items() if text.strip()}


def plain() -> dict[str, str]:
    """The files of the folder. The autoscaler's is rendered apart: with it the Deployment does not say how many."""
    manifests = rendered({part: {"enabled": True} for part in OPTIONAL})
    manifests["autoscaling.yaml"] = rendered({"autoscaling": {"enabled": True}})["autoscaling.yaml"]
    head = "# The chart beside this folder, rendered with its defaults by deploy/kubernetes/render.py: change that.\n"
    return {name: head + text for name, text in manifests.items()}


if __name__ == "__main__":
    PLAIN.mkdir(exist_ok=True)
    for name, text in plain().items():
        (PLAIN / name).write_text(text)
