"""The training loop: accumulation, warm-up and cosine, evaluation, early stop, checkpoints that resume bit for bit."""

import hashlib
import io
import json
import math
import pickle
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tucka_runtime.durable import write_file
from tucka_runtime.errors import ConfigError
from tucka_runtime.messages import ROUTE_PREFIX_TOKENS
from tucka_runtime.trainer.adapter import settled
from tucka_runtime.trainer.classification import Classification
from tucka_runtime.trainer.data import Example, epoch
from tucka_runtime.trainer.evaluate import Completions, HeldOut
from tucka_runtime.trainer.model import set_route_scope
from tucka_runtime.trainer.objective import Objective
from tucka_runtime.trainer.preferences import Preferences
from tucka_runtime.trainer.progress import Progress, Step

CHECKPOINT = "checkpoint.pt"
OBJECTIVES = ("sft", "dpo", "classify")

# What --route-batch means: which scopes the steps of a run take in turn. Of these a server takes the first.
ROUTES = {
    "batch": ("batch",),
    "per-sample": ("request",),
    "prefix": ("prefix",),
    "mixed": ("request", "decode", "batch"),
}


@dataclass(frozen=True)
class LoopConfig:
    """How to train; `steps` are optimiser steps, each over batch_size · accumulate examples."""

    steps: int
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    route_batch: str = "per-sample"
    route_prefix_tokens: int = ROUTE_PREFIX_TOKENS
    eval_every: int = 0
    patience: int = 0
    checkpoint_every: int = 0
    seed: int = 0
    packing: bool = False
    group_by_length: bool = False
    gradient_checkpointing: bool = False
    objective: str = "sft"
    beta: float = 0.1
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "route_prefix_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1")
        for name in ("weight_decay", "patience", "eval_every", "checkpoint_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0")
        if not 0 <= self.seed < 2**32:
            raise ConfigError("seed must be from 0 to below 2 to the power of 32")
        if not 0 < self.lr < math.inf or not 0 <= self.warmup < 1:
            raise ConfigError("lr must be above 0, and warmup a share of the steps from 0 to below 1")
        if self.route_batch not in ROUTES:
            raise ConfigError(f"route_batch must be one of {', '.join(ROUTES)}")
        if self.patience and not self.eval_every:
            raise ConfigError("patience counts evaluations: set eval_every too")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective must be one of {', '.join(OBJECTIVES)}")
        if not 0 < self.beta < math.inf:
            raise ConfigError("beta must be above 0")
        if self.objective != "dpo" and self.beta != LoopConfig.beta:
            raise ConfigError("beta is DPO's: use it with objective dpo")
        if self.objective != "sft" and self.packing:
            raise ConfigError("packing is for completions: answers of pairs, and labelled texts, have a row each")

    @property
    def served_scope(self) -> str:
        """The route scope that a server takes for what was trained so."""
        return ROUTES[self.route_batch][0]


def _objective(config: LoopConfig) -> Objective:
    if config.objective == "classify":
        return Classification(config.labels)
    return Preferences(config.beta) if config.objective == "dpo" else Completions(config.packing)


class Diverged(ConfigError):
    """A loss is no number any more."""


@dataclass
class Work:
    """What one optimiser step computes: its micro-batches as the model's arguments, how many completion tokens these
    have, or pairs or texts, how many tokens without padding, and the loss so far."""

    batches: list[dict[str, torch.Tensor]]
    targets: int
    tokens: int
    before: torch.Tensor | None
    loss: float = 0.0


@dataclass
class History:
    """What the figures need, one entry a step (or an evaluation)."""

    loss: list[float] = field(default_factory=list)
    load: list[list[int]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    best: float = math.inf
    since_best: int = 0
    stopped_early: bool = False


def learning_rate(config: LoopConfig, step: int) -> float:
    """Linear warm-up, then cosine to zero."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def _digest(records: list[Any]) -> str:
    gaps = "".join(repr(e.gaps) for e in records if isinstance(e, Example) and e.gaps)
    return hashlib.sha256((repr(records) + gaps).encode()).hexdigest()


class Loop:
    """Trains the parameters that require gradients; `router` is the adapter's (None for LoRA), and `base` says which
    base the model has, for a run that is continued."""

    def __init__(
        self, model: Any, train: list[Any], held: list[Any], config: LoopConfig, *, pad: int,
        device: torch.device, router: Any = None, folder: Path | None = None, progress: Progress | None = None,
        base: str = "",
    ):  # fmt: skip
        self.model, self.train, self.held, self.config = model, train, held, config
        self.pad, self.device, self.router, self.folder, self.progress = pad, device, router, folder, progress
        self.base = base
        self.parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [p for _, p in self.parameters], lr=config.lr, weight_decay=config.weight_decay
        )
        self.objective = _objective(config)
        self.history = History()
        self.step = 0
        self.stopping = False  # set from outside: the run ends after the step that it is in
        self.best: dict[str, torch.Tensor] | None = None
        self._epoch: tuple[int, list[list[Any]]] = (-1, [])

    @property
    def turn(self) -> int:
        """Steps after which every route scope has had its turn."""
        return 1 if self.router is None else len(ROUTES[self.config.route_batch])

    @property
    def finished(self) -> bool:
        return self.step >= self.config.steps or self.history.stopped_early

    def run(self) -> History:
        """Trains to the last step or the early stop; afterwards the model holds the best evaluated weights. A run that
        is stopping ends sooner, and the model holds what a checkpoint is to have."""
        self.model.train()
        while not self.finished and not self.stopping:
            work = self.begin()
            for batch in work.batches:
                self.learn(work, self.objective.logits(self.model, batch), batch).backward()
            self.end(work)
        return self.history

    def _checkpoint(self, folder: Path) -> None:
        """A disk that is full ends no training: the checkpoint before stays, and the next one may fit."""
        try:
            self.save(folder)
        except OSError as error:
            if self.progress:
                self.progress.warn(f"no checkpoint was written at step {self.step}: {error.strerror}.")

    def _micro_batch(self, index: int) -> list[Any]:
        if self._epoch[0] < 0:
            self._epoch = (0, self._batches(0))
        per_epoch = len(self._epoch[1])  # the same in every epoch
        number, at = divmod(index, per_epoch)
        if self._epoch[0] != number:
            self._epoch = (number, self._batches(number))
        return self._epoch[1][at]

    def _batches(self, number: int) -> list[list[Any]]:
        c = self.config
        return epoch(self.train, c.batch_size, c.seed, number, c.route_batch == "batch", c.group_by_length)

    def _collate(self, batch: list[Any]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.device) for name, tensor in self.objective.collate(batch, self.pad).items()}

    def begin(self) -> Work:
        """Readies one optimiser step: its batches, the route scope, the learning rate."""
        c, before = self.config, None
        if self.router is not None:
            scopes = ROUTES[c.route_batch]
            self._route(scopes[self.step % len(scopes)])
            # Serving has no balancing bias: fade it out, so that the routes that were learnt are the ones served.
            self.router.bias_scale = max(0.0, 1 - 2 * self.step / c.steps)
            before = self.router.counts.clone()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(c, self.step)
        examples = [self._micro_batch(self.step * c.accumulate + i) for i in range(c.accumulate)]
        batches = [self._collate(batch) for batch in examples]
        targets = sum(self.objective.count(batch) for batch in batches)
        return Work(batches, targets, sum(e.tokens for batch in examples for e in batch), before)

    def learn(self, work: Work, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """A micro-batch's part of the step's loss, which is the mean over all the step's completion tokens, pairs or
        texts, however they fall into batches. Raises Diverged."""
        loss = self.objective.loss(self.model, logits, batch) / work.targets
        if not torch.isfinite(loss):
            raise Diverged(
                f"The loss became {loss.item()} at step {self.step + 1}. Lower --lr or --alpha and start again."
            )
        work.loss += loss.item()
        return loss

    def end(self, work: Work) -> None:
        """Takes the step that the gradients say, and what is due after it: figures, evaluation, checkpoint; after the
        last, the best evaluated weights."""
        nn.utils.clip_grad_norm_([p for _, p in self.parameters], self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        load = [] if self.router is None else (self.router.counts - work.before).tolist()
        self.history.loss.append(work.loss)
        self.history.load.append(load)
        self.step += 1
        if self.progress:
            rate = learning_rate(self.config, self.step - 1)
            self.progress.step(Step(self.step, work.loss, load, work.tokens, rate))
        every = self.config.eval_every
        if self.held and every and (self.step % every == 0 or self.step == self.config.steps):
            self._evaluate()
        every = self.config.checkpoint_every
        if self.folder and every and self.step % every == 0 and not self.finished:
            self._checkpoint(self.folder)
        if self.finished and self.best is not None:
            with torch.no_grad():
                for name, p in self.parameters:
                    p.copy_(self.best[name])

    def _route(self, scope: str) -> None:
        set_route_scope(self.model, scope, prefix_tokens=self.config.route_prefix_tokens)

    def evaluate(self) -> HeldOut:
        """Held-out figures under the scope that serving would take."""
        if self.router is not None:
            self._route(self.config.served_scope)
        return self.objective.evaluate(self.model, self.held, self.pad, self.device, self.router)

    def evaluate_base(self) -> HeldOut | None:
        """The same held-out figures of the base alone; None where these say nothing."""
        return self.objective.evaluate_base(self.model, self.held, self.pad, self.device)

    def _evaluate(self) -> None:
        result = self.evaluate()
        if self.progress:
            self.progress.evaluated(self.step, result)
        h = self.history
        h.evals.append({"step": self.step, **result.figures})
        if result.loss < h.best:
            h.best, h.since_best = result.loss, 0
            self.best = {n: p.detach().clone() for n, p in self.parameters}
        else:
            h.since_best += 1
            h.stopped_early = bool(self.config.patience) and h.since_best >= self.config.patience

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """What has to be the same for a run to be continued: settings, adapter, the base and its type, data."""
        frozen = {str(p.dtype).removeprefix("torch.") for p in self.model.parameters() if not p.requires_grad}
        numbers = asdict(self.config)
        del numbers["checkpoint_every"]  # changes nothing of what is computed
        return numbers | {
            "adapter": settled(self.model.peft_config["default"]), "dtype": sorted(frozen),
            "data": _digest(self.train), "held_out": _digest(self.held), "base": self.base,
        }  # fmt: skip

    def _as_saved(self, saved: dict[str, Any], name: str) -> Any:
        """A setting of a checkpoint. What did not exist when that was written had the value that is now its default,
        among the loop's settings and among the adapter's; of the base and what is held out it is not known."""
        if name == "adapter":
            config = self.model.peft_config["default"]
            text = settled(type(config)())
            return json.dumps(json.loads(text) | json.loads(saved[name]), sort_keys=True)
        if name in ("base", "held_out"):
            return saved.get(name, self._settings[name])
        return saved.get(name, getattr(LoopConfig(steps=1), name, None))

    def save(self, folder: Path) -> None:
        """Writes everything that a resumed run needs to continue as if never stopped; the old file stays until the end.

        Raises OSError.
        """
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "config": self._settings, "step": self.step, "history": asdict(self.history),
            "parameters": {n: p.detach() for n, p in self.parameters}, "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(), "best": self.best,
            "router": self.router.state_dict() if self.router is not None else None,
        }  # fmt: skip
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_file(folder, CHECKPOINT, buffer.getvalue())

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint of the same settings and data. Raises ConfigError when they differ, and for a file
        that is no checkpoint."""
        try:
            state = torch.load(folder / CHECKPOINT, weights_only=True, map_location=self.device)
            saved = state["config"]
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ConfigError(
                f"{folder / CHECKPOINT} is no checkpoint of a training: start anew, with --overwrite instead of "
                "--resume."
            ) from error
        changed = [k for k, v in self._settings.items() if self._as_saved(saved, k) != v]
        if changed:
            raise ConfigError(
                f"The checkpoint was made with other settings ({', '.join(changed)}): it cannot continue bit for bit. "
                "Use the same settings, or start anew: --overwrite instead of --resume."
            )
        if {n: p.shape for n, p in self.parameters} != {n: p.shape for n, p in state["parameters"].items()}:
            raise ConfigError(
                "The checkpoint is of another adapter or base: start anew, with --overwrite instead of --resume."
            )
        with torch.no_grad():
            for name, p in self.parameters:
                p.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        self.history, self.step, self.best = History(**state["history"]), state["step"], state["best"]
        if self.router is not None:
            self.router.load_state_dict(state["router"])
