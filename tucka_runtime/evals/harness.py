"""Tasks of lm-eval, asked of a running server: the base and its adapters by the same requests.

lm-eval makes the requests, reads the answers and knows what is right; its own model `local-completions` (or
`local-chat-completions`) speaks to the server, with the server's tokenizer.
"""

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tucka_runtime.client import client_key, server_address
from tucka_runtime.errors import ConfigError
from tucka_runtime.extras import how_to_install, installed
from tucka_runtime.terminal import aligned

TOGETHER = 16  # requests to the server at once


@dataclass(frozen=True)
class TaskScore:
    """What a model scored by one metric of a task, with its standard error where lm-eval knows one."""

    model: str
    route: str | None
    task: str
    metric: str
    value: float
    error: float | None
    records: int


@dataclass(frozen=True)
class Harness:
    """Tasks of lm-eval, or of `include_path`, and the server that is asked: by chat, or by completions."""

    url: str
    api_key: str | None
    tasks: Sequence[str]
    include_path: Path | None
    num_fewshot: int | None
    limit: int | None
    max_tokens: int
    chat: bool

    def check(self) -> None:
        """Raises ConfigError where lm-eval is not installed, or does not know one of the tasks."""
        if not installed("harness"):
            raise ConfigError(f"--tasks are lm-eval's, which is not installed: {how_to_install('harness')}.")
        if missing := [name for name in self.tasks if not self._known.match_tasks([name])]:
            raise ConfigError(
                f"--tasks: lm-eval has no task {', '.join(missing)}. `lm-eval ls tasks` lists those that it has; your "
                "own are YAML files in the folder of --include-path."
            )

    def ask(self, model: str, route: str | None) -> list[TaskScore]:
        """What a model of the server scores. Raises ConfigError with what stopped lm-eval."""
        from lm_eval import simple_evaluate

        try:
            found = simple_evaluate(
                model=self._asked(model, route), tasks=list(self.tasks), num_fewshot=self.num_fewshot,
                limit=self.limit, apply_chat_template=self.chat, task_manager=self._known, log_samples=False,
                bootstrap_iters=1000,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
            raise ConfigError(
                f"lm-eval stopped at {model}: {type(error).__name__}: {error}. It fetches tasks' records from the "
                "Hugging Face hub unless they are there already, and asks for log-likelihoods by completions alone."
            ) from error
        return _scores(found, model, route)

    @cached_property
    def _known(self) -> Any:
        """lm-eval's index of tasks, which reads thousands of files."""
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self.include_path and str(self.include_path))

    def _asked(self, model: str, route: str | None) -> Any:
        """lm-eval's model of one that is served."""
        from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

        kind: Any = LocalChatCompletion if self.chat else LocalCompletionsAPI

        class Routed(kind):  # type: ignore[misc]
            def _create_payload(self, *args: Any, **more: Any) -> dict[str, Any]:
                body: dict[str, Any] = super()._create_payload(*args, **more)
                return body if route is None else body | {"route": route}

        key = client_key(self.api_key)
        door = "chat/completions" if self.chat else "completions"
        return Routed(
            model=model, base_url=f"{server_address(self.url)}/v1/{door}",
            tokenizer_backend=None if self.chat else "remote", num_concurrent=TOGETHER, max_retries=1,
            max_gen_toks=self.max_tokens, auth_token=key, header={"Authorization": f"Bearer {key}"} if key else None,
        )  # fmt: skip


def _scores(found: dict[str, Any], model: str, route: str | None) -> list[TaskScore]:
    rows = []
    for task, figures in found["results"].items():
        records = found["n-samples"].get(task, {}).get("effective", 0)
        for key, value in figures.items():
            metric, _, of = key.partition(",")
            if not of or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{of}")
            name = metric if of == "none" else f"{metric} ({of})"
            rows.append(
                TaskScore(model, route, task, name, value, error if isinstance(error, float) else None, records)
            )
    return rows


def table(rows: Sequence[TaskScore]) -> str:
    """A line for each task and metric, the base beside the adapters."""
    asked = list(dict.fromkeys((row.model, row.route) for row in rows))
    found = {(row.task, row.metric, row.model, row.route): row for row in rows}
    lines = [["task", "metric", "records", *(f"{model} ({route})" if route else model for model, route in asked)]]
    for task, metric, records in dict.fromkeys((row.task, row.metric, row.records) for row in rows):
        own = (found.get((task, metric, *who)) for who in asked)
        lines.append([task, metric, str(records), *map(_cell, own)])
    return aligned(lines)


def write(folder: Path, rows: Sequence[TaskScore], about: dict[str, Any]) -> None:
    """report.json. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    report = about | {"lm_eval": importlib.metadata.version("lm_eval"), "rows": [asdict(row) for row in rows]}
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _cell(row: TaskScore | None) -> str:
    if row is None:
        return "-"
    return f"{row.value:.3f}" + (f" ± {row.error:.3f}" if row.error is not None else "")
