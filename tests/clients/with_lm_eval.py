"""lm-eval: a task of its own with generation and one with log-likelihoods, by completions and by chat."""

import json
import tempfile
from pathlib import Path

from checks import BASE, URL, check, command, same

DATES = [("2024-03-05", "5 March 2024"), ("2023-11-17", "17 November 2023"), ("2020-01-30", "30 January 2020")]
MODELS = ("formats", "base")
OUTPUT = {
    "generate_until": "generation_kwargs: {until: ['<|end|>'], max_gen_toks: 32, do_sample: false}",
    "multiple_choice": "doc_to_choice: choices",
}
METRIC = {"generate_until": "exact_match", "multiple_choice": "acc"}


def write_tasks(folder: Path) -> None:
    """The same question twice: its answer is to be said, and to be likelier than another date's.

    Its `q` keeps the library `datasets` from making times of the dates.
    """
    rows = [
        {"asked": f"q{asked}", "answer": answer, "choices": [answer, other], "gold": 0}
        for (asked, answer), (_, other) in zip(DATES, DATES[1:] + DATES[:1], strict=True)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, more in OUTPUT.items():
        target = "answer" if kind == "generate_until" else "gold"
        for form, prompt in (("chat", "{{asked[1:]}}"), ("plain", "<|user|>{{asked[1:]}}<|assistant|>")):
            (folder / f"{kind}_{form}.yaml").write_text(
                f"task: {kind}_{form}\ndataset_path: json\ntest_split: test\n"
                f"dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n"
                f"output_type: {kind}\ndoc_to_text: '{prompt}'\ndoc_to_target: {target}\ntarget_delimiter: ''\n{more}\n"
                f"metric_list: [{{metric: {METRIC[kind]}, aggregation: mean, higher_is_better: true}}]\n"
            )


def score(model: str, kind: str, name: str, door: str, *flags: str, tokenizer: str = f"tokenizer={BASE}") -> float:
    """What a model of the server gets in the task."""
    form = "chat" if "chat" in model else "plain"
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_tasks(folder)
        command(
            "lm_eval", "run", "--model", model, "--tasks", f"{kind}_{form}", "--include_path", made,
            "--output_path", made,
            "--model_args", f"model={name},base_url={URL}/v1/{door},{tokenizer},num_concurrent=2,max_retries=1",
            *flags, folder=folder, HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=made,
        )  # fmt: skip
        (found,) = folder.rglob("results_*.json")
        (figures,) = json.loads(found.read_text())["results"].values()
    return figures[f"{METRIC[kind]},none"]


@check("generate_until by local-completions: right with its adapter, wrong with the base")
def _() -> None:
    same(
        [score("local-completions", "generate_until", name, "completions") for name in ("formats", "base")], [1.0, 0.0]
    )


@check("log-likelihoods by local-completions")
def _() -> None:
    same(score("local-completions", "multiple_choice", "formats", "completions"), 1.0)


@check("generate_until by local-chat-completions")
def _() -> None:
    same(score("local-chat-completions", "generate_until", "formats", "chat/completions", "--apply_chat_template"), 1.0)


@check("the server's own tokenizer")
def _() -> None:
    remote = "tokenizer_backend=remote"
    same(score("local-completions", "multiple_choice", "formats", "completions", tokenizer=remote), 1.0)
