"""Where the figures of a training go beside the terminal: TensorBoard, Weights & Biases, Trackio."""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tucka_runtime.errors import ConfigError

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "tucka"


class Tracker(Protocol):
    """Takes figures of a step by name, as `train/loss`, until it is closed."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Run:
    """wandb, or trackio, which has wandb's interface."""

    def __init__(self, module: Any, name: str, config: dict[str, Any]):
        self._module = module
        module.init(project=PROJECT, name=name, config=config)

    def log(self, values: dict[str, float], step: int) -> None:
        self._module.log(values, step=step)

    def close(self) -> None:
        self._module.finish()


def check(names: Sequence[str]) -> None:
    """Raises ConfigError where one of TRACKERS is not installed."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"--report-to {' '.join(missing)}: not installed. pip install {' '.join(missing)}.")


def start(names: Sequence[str], folder: Path, config: dict[str, Any]) -> list[Tracker]:
    """A tracker each; TensorBoard's files go into `runs` of the adapter's folder. `config` are the run's settings.
    Raises ConfigError where one cannot be started."""
    found: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            found.append(_TensorBoard(folder / "runs"))
            continue
        module: Any = importlib.import_module(name)
        try:
            found.append(_Run(module, folder.resolve().name, config))
        except (OSError, RuntimeError, ValueError, getattr(module, "Error", OSError)) as error:
            raise ConfigError(f"--report-to {name} could not start: {error}") from error
    return found
