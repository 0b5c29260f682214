"""The model card of a trained adapter (README.md in its folder), filled from what training.json says."""

from typing import Any

import yaml

CARD_NAME = "README.md"


def card(name: str, training: dict[str, Any]) -> str:
    """The card of an adapter `name`, as Hugging Face's hub reads it."""
    adapter, data, loop = training["adapter"], training["data"], training["loop"]
    tuck = training["method"] == "tucka"
    head = {
        "base_model": training["base"], "library_name": "peft",
        "pipeline_tag": "text-classification" if loop["objective"] == "classify" else "text-generation",
        "tags": [training["method"], "tucka-runtime"],
    }  # fmt: skip
    size = f"r = {adapter['r']}, alpha = {adapter['alpha']:g}"
    if tuck:
        size += f", {adapter['k']} groups of {adapter['t']} experts, p = {adapter['p']}"
    trained = (
        f"{training['steps']} steps of {loop['batch_size'] * loop['accumulate']} examples, "
        f"{_objective(loop)}learning rate {loop['lr']:g}, seed {loop['seed']}, {training['seconds']:.0f} s"
    )
    rows = [
        ("Kind", "TuckA ([arXiv 2511.06859](https://arxiv.org/abs/2511.06859))" if tuck else "LoRA"),
        ("Base", f"{training['base']} (fingerprint `{training['base_fingerprint'][:16]}…`)"),
        ("Size", f"{size}: {training['trainable_parameters']:,} parameters on {', '.join(adapter['target_modules'])}"),
        ("Data", f"{data['file']} (SHA-256 `{data['sha256'][:16]}…`): {data['train']} examples trained on, "
                 f"{data['held_out']} held out"),
        ("Training", f"{trained}, {training['date']}"),
        ("Made with", ", ".join(f"{part} {version}" for part, version in training["versions"].items())),
    ]  # fmt: skip
    if loop["objective"] == "classify":
        rows.append(("Labels", ", ".join(f"{i}: {label}" for i, label in enumerate(loop["labels"]))))
    if "route" in training:
        prefix = f", the first {training['route_prefix_tokens']} tokens" if "route_prefix_tokens" in training else ""
        rows.append(("Route scope", f"`{training['route']}`{prefix}"))
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=True)}---",
        f"# {name}",
        "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows),
        _measured(training),
        _use_classifier(training) if loop["objective"] == "classify" else _use(name, training),
    ]
    if training["warnings"]:
        parts.append("## Warnings\n\n" + "\n".join(f"- {warning}" for warning in training["warnings"]))
    return "\n\n".join(parts) + "\n"


def _objective(loop: dict[str, Any]) -> str:
    return f"DPO with beta = {loop['beta']:g}, " if loop["objective"] == "dpo" else ""


def _measured(training: dict[str, Any]) -> str:
    held = training.get("eval")
    if held is None:
        return "## Measured\n\nNothing was held out, so what this adapter can do has not been measured."
    count = training["data"]["held_out"]
    if training["loop"]["objective"] == "dpo":
        return (
            f"## Measured\n\nOf {count} held-out pairs {held['accuracy']:.1%} are told apart rightly: the better answer"
            f" gains more over the base than the worse does. Their mean reward margin is {held['margin']:.3f}."
        )
    if training["loop"]["objective"] == "classify":
        return f"## Measured\n\nOn {count} held-out texts: accuracy {held['accuracy']:.3f}, F1 {held['f1']:.3f}."
    lines = [
        "| | exact match | loss |\n|---|---:|---:|",
        f"| base | {held['base']['exact_match']:.3f} | {held['base']['loss']:.4f} |",
        f"| with the adapter | {held['exact_match']:.3f} | {held['loss']:.4f} |",
    ]
    if len(held["by_task"]) > 1:
        lines += [f"| … {task} | {value:.3f} | |" for task, value in held["by_task"].items()]
    return f"## Measured\n\nOn {count} held-out examples, greedily:\n\n" + "\n".join(lines)


def _routing(training: dict[str, Any]) -> tuple[str, str]:
    """The lines that a TuckA adapter needs with `peft`: before it is loaded, and behind that. A new model's route scope
    is `batch`, so the one that was measured is set."""
    if training["method"] != "tucka":
        return "", ""
    tokens = f", prefix_tokens={training['route_prefix_tokens']}" if "route_prefix_tokens" in training else ""
    return (
        "import tucka_runtime.trainer  # teaches peft the method\n",
        f'tucka_runtime.trainer.set_route_scope(model, "{training["route"]}"{tokens})\n',
    )


def _use(name: str, training: dict[str, Any]) -> str:
    imported, scope = _routing(training)
    return (
        f"## Use\n\n    tucka serve --model BASE --adapter {name}=FOLDER\n\n"
        f"or with `peft`:\n\n```python\nimport peft, transformers\n{imported}"
        'base = transformers.AutoModelForCausalLM.from_pretrained("BASE")\n'
        f'model = peft.PeftModel.from_pretrained(base, "FOLDER").eval()\n{scope}```'
    )


def _use_classifier(training: dict[str, Any]) -> str:
    """By `peft` alone."""
    labels = list(training["loop"]["labels"])
    imported, scope = _routing(training)
    return (
        "## Use\n\nA classifier, which is used with `peft`; servers of texts do not serve it:\n\n"
        f"```python\nimport peft, torch, transformers\n{imported}"
        f'labels = {labels!r}\ntokenizer = transformers.AutoTokenizer.from_pretrained("BASE")\n'
        f'base = transformers.AutoModelForSequenceClassification.from_pretrained("BASE", num_labels={len(labels)})\n'
        f'model = peft.PeftModel.from_pretrained(base, "FOLDER").eval()\n{scope}'
        'ids = tokenizer("...", return_tensors="pt").input_ids\n'
        "with torch.no_grad():\n    print(labels[model(input_ids=ids).logits.argmax()])\n```"
    )
