"""The file of `tucka serve --ray`: how many servers there are, what each may use, and what each of them serves.

What Ray Serve has a setting for has its name here, so that its own pages explain it; nothing of Ray is imported.
"""

import os
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tucka_runtime.affinity import SPILL_AT
from tucka_runtime.base_gguf import model_name
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.embedded import with_embedded_default
from tucka_runtime.errors import ConfigError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Autoscaling(_Strict):
    """Serve's own autoscaler: as many replicas as keep every target that is given, each of them for one replica.
    `target_waiting` are sequences before the engine's batch, `target_tokens_per_second` those that it generates."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(ge=1)
    initial_replicas: int | None = Field(default=None, ge=0)
    target_ongoing_requests: float = Field(gt=0)
    target_waiting: float | None = Field(default=None, gt=0)
    target_tokens_per_second: float | None = Field(default=None, gt=0)
    upscale_delay_s: float = Field(default=30.0, ge=0)
    downscale_delay_s: float = Field(default=600.0, ge=0)
    look_back_period_s: float = Field(default=30.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> "Autoscaling":
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas must not be over max_replicas")
        if self.initial_replicas is not None and not self.min_replicas <= self.initial_replicas <= self.max_replicas:
            raise ValueError("initial_replicas must be from min_replicas to max_replicas")
        return self

    @property
    def own_targets(self) -> dict[str, float]:
        """What Serve's default policy does not know, by what `scaling.LoadPolicy` calls it."""
        targets = {"waiting": self.target_waiting, "tokens_per_second": self.target_tokens_per_second}
        return {name: target for name, target in targets.items() if target is not None}


class Resources(_Strict):
    """What Ray sets aside for each replica. Fractions share a GPU."""

    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    resources: dict[str, Annotated[float, Field(ge=0)]] = {}

    @field_validator("resources")
    @classmethod
    def _own(cls, resources: dict[str, float]) -> dict[str, float]:
        """Ray refuses names that it has settings of their own for, once the fleet is started."""
        if taken := sorted(resources.keys() & {"CPU", "GPU", "memory", "object_store_memory"}):
            raise ValueError(
                f"{', '.join(taken)} cannot be a resource of your own: of cores and GPUs say num_cpus and num_gpus"
            )
        return resources


class Routing(_Strict):
    """Which replica has an adapter's requests (`placement.ranks`). `copies` says for how many replicas an adapter is at
    home, where one is not enough; `spill_at` how many requests a replica has at the least before others take its."""

    copies: dict[str, Annotated[int, Field(ge=1)]] = {}
    spill_at: int = Field(default=SPILL_AT, ge=1)


class Fleet(_Strict):
    """`serve` are settings of `tucka serve` by their names in --config, of every replica."""

    serve: dict[str, Any] = {}
    replicas: int | None = Field(default=None, ge=1)
    autoscaling: Autoscaling | None = None
    resources: Resources = Resources()
    routing: Routing = Routing()
    ingresses: int = Field(default=1, ge=1)
    max_ongoing_requests: int = Field(default=100, ge=1)
    graceful_shutdown_timeout_s: float = Field(default=120.0, gt=0)
    health_check_period_s: float = Field(default=10.0, gt=0)


def read_fleet(path: Path) -> Fleet:
    """Raises ConfigError."""
    try:
        value = yaml.safe_load(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"--ray {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"--ray {path} is not valid YAML.") from None
    return fleet_of(value or {}, f"--ray {path}")


def fleet_of(value: object, called: str) -> Fleet:
    """The fleet of a mapping. Raises ConfigError, which calls it as said."""
    try:
        fleet = Fleet.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{called}: {where}: {first['msg']}. docs/scale.md has all settings.") from None
    if (fleet.replicas is None) == (fleet.autoscaling is None):
        raise ConfigError(f"{called} has to have one of `replicas`, a number, and `autoscaling`, a mapping.")
    return fleet


def check_shared(config: ServerConfig) -> None:
    """Raises ConfigError for what one server may have and several cannot share, or what Serve does in its place."""
    for name in ("state_dir", "metrics_port", "audit_log"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"{name} is one server's own, and the replicas of --ray would all have the same. Leave it out: "
                "adapters are declared (adapters_file, adapter_watch, adapter_resolve), and /metrics has the figures "
                "of all replicas."
            )


def base_names(engine_config: EngineConfig, config: ServerConfig) -> tuple[str, ...]:
    """What requests call the base, as far as it can be told without looking for it."""
    if config.served_model_name:
        return config.served_model_name
    model = with_embedded_default(engine_config, config)[0].model or ""
    if os.path.isdir(model):
        return (Path(model).resolve().name,)
    if os.path.isfile(model) or model.endswith(".gguf"):
        return (model_name(Path(model)),)
    return (model.partition("@")[0],)
