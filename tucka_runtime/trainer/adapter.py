"""Makes a trainable adapter on a base, and writes a trained one in the official layout."""

import errno
import hashlib
import json
import math
import os
import platform
import random
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import peft
import torch
import transformers
from safetensors import SafetensorError

from tucka_runtime import __version__
from tucka_runtime.adapters.files import CONFIG_NAME, TRAINING_NAME, WEIGHTS_NAME
from tucka_runtime.errors import ConfigError
from tucka_runtime.trainer.config import TuckAConfig
from tucka_runtime.trainer.model import routers
from tucka_runtime.trainer.up_projection import UpProjection


@dataclass(frozen=True)
class AdapterSettings:
    """Which adapter to make. k, t, p and the centroid settings are TuckA's alone, dropout, rslora and dora LoRA's;
    alpha is lora_alpha for LoRA. `task` is PEFT's task type; `head` are the modules that are trained whole and saved
    beside the adapter."""

    method: str = "tucka"
    r: int = 8
    k: int = 4
    t: int = 2
    p: int = 2
    alpha: float = field(kw_only=True)
    target_modules: tuple[str, ...] = ("all-linear",)
    centroids: str = "data"
    ec_perturb_scale: float = 1.0
    balance: float = 0.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    task: str = "CAUSAL_LM"
    head: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in ("tucka", "lora"):
            raise ConfigError("method must be tucka or lora")
        if self.centroids not in ("data", "kaiming"):
            raise ConfigError("centroids must be data (set from the first batch) or kaiming")
        if self.method != "lora" and (self.dropout or self.rslora or self.dora):
            raise ConfigError("dropout, rslora and dora are LoRA's: use them with method lora")
        if not 0 <= self.dropout < 1:
            raise ConfigError("dropout must be from 0 to below 1")
        if not math.isfinite(self.alpha) or not 0 <= self.balance < math.inf:
            raise ConfigError("alpha must be a finite number, and balance one from 0")
        try:
            self.peft_config()
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def peft_config(self) -> peft.PeftConfig:
        """The PEFT configuration; ValueError for sizes that cannot work."""
        targets: Any = "all-linear" if self.target_modules == ("all-linear",) else list(self.target_modules)
        common: dict[str, Any] = {"task_type": self.task, "modules_to_save": list(self.head) or None}
        if self.method == "lora":
            alpha: Any = int(self.alpha) if self.alpha == int(self.alpha) else self.alpha
            return peft.LoraConfig(
                r=self.r, lora_alpha=alpha, target_modules=targets, lora_dropout=self.dropout, use_rslora=self.rslora,
                use_dora=self.dora, **common,
            )  # fmt: skip
        return TuckAConfig(
            r=self.r, k=self.k, t=self.t, p=self.p, alpha=self.alpha, target_modules=targets,
            ec_perturb_scale=self.ec_perturb_scale, use_kaiming_init_ec=self.centroids == "kaiming",
            use_alb=self.balance > 0, alb_gamma=self.balance or 0.001, **common,
        )  # fmt: skip


def seed_all(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def attach(base: Any, settings: AdapterSettings, seed: int) -> Any:
    """A PeftModel with one fresh adapter named "default"; initialised from `seed` alone."""
    seed_all(seed)
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers for a property by its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = peft.get_peft_model(base, settings.peft_config())
    except ValueError as error:
        raise ConfigError(str(error)) from error
    UpProjection.replace_in(model)
    return model


def router_of(model: Any) -> Any:
    """The router of the adapter "default"; None for LoRA."""
    try:
        return routers(model)["default"]
    except ValueError:
        return None


def trainable_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def write(model: Any, folder: Path, base_name: str, training: dict[str, Any]) -> None:
    """Saves the adapter with training.json beside it; only the base's bare name is recorded, never a local path.

    Files take their places when all of them are written: a disk that is full leaves what was there before. Raises
    OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].base_model_name_or_path = base_name
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as made:
        try:
            model.save_pretrained(made, save_embedding_layers=False)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from error
        config_path, weights_path = Path(made) / CONFIG_NAME, Path(made) / WEIGHTS_NAME
        config = json.loads(config_path.read_text())
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()  # PEFT keeps a set: its order changes from run to run
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (Path(made) / TRAINING_NAME).write_text(json.dumps(training, indent=2) + "\n")
        # safetensors keeps its file to its owner; a server may be another user
        weights_path.chmod(stat.S_IMODE(config_path.stat().st_mode))
        for name in (WEIGHTS_NAME, CONFIG_NAME, TRAINING_NAME):
            os.replace(Path(made) / name, folder / name)


def keep(write: Callable[[Path], None], folder: Path) -> Path:
    """Writes a training's result into `folder`, or where that cannot be done (a full disk), somewhere else; returns
    where it is. Raises ConfigError if no place takes it."""
    try:
        write(folder)
        return folder
    except OSError as error:
        reason = error.strerror
    for place in (folder.absolute().parent, Path(tempfile.gettempdir()), Path.home(), Path("/dev/shm")):
        try:
            made = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=place))
        except OSError:
            continue
        try:
            write(made)
            return made
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
    raise ConfigError(f"{folder} could not be written ({reason}), nor could any other place: the training is lost.")


def digest(data: bytes | Iterable[str]) -> str:
    """SHA-256 of a file's bytes, or of lines each ended by a newline."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha256("".join(f"{line}\n" for line in data).encode()).hexdigest()


def settled(config: Any) -> str:
    """An adapter's configuration as text, but for the base's place: the same base may lie elsewhere."""
    table = config.to_dict()
    del table["base_model_name_or_path"]
    return json.dumps(table, default=sorted, sort_keys=True)


def manifest(
    settings: AdapterSettings,
    loop: Any,
    history: Any,
    result: Any,
    base_result: Any,
    *,
    base_name: str,
    base_fingerprint: str,
    data: dict[str, Any],
    parameters: int,
    router: Any,
    seconds: float,
    flags: dict[str, Any],
    warnings: list[str],
) -> dict[str, Any]:
    """training.json: enough to make the adapter again and to know what it can do. `flags` are the command's, as its
    --config file would have them."""
    out: dict[str, Any] = {
        "made_by": "tucka train",
        "method": settings.method,
        "base": base_name,
        "base_fingerprint": base_fingerprint,
        "data": data,
        "adapter": asdict(settings),
        "loop": asdict(loop),
        "trainable_parameters": parameters,
        "steps": len(history.loss),
        "stopped_early": history.stopped_early,
        "final_loss": round(history.loss[-1], 5) if history.loss else None,
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "flags": flags,
        "threads": torch.get_num_threads(),
        "versions": {
            "tucka": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "peft": peft.__version__,
        },
        "warnings": warnings,
    }  # fmt: skip
    if router is not None:
        out["route"] = loop.served_scope
        if loop.served_scope == "prefix":
            out["route_prefix_tokens"] = loop.route_prefix_tokens
        out["routing"] = router.statistics()
    if result is not None:
        out["eval"] = {
            **_rounded(result.figures),
            "by_task": {task: round(v, 4) for task, v in result.by_task.items()},
        }
        if base_result is not None:
            out["eval"]["base"] = _rounded(base_result.figures)
        if result.groups:
            out["eval"]["groups_by_task"] = result.groups
    return out


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 5 if name == "loss" else 4) for name, value in figures.items()}
