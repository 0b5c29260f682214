"""TuckA's configuration in the PEFT manner; the fields and their names are those of the official files."""

from dataclasses import dataclass, field
from typing import Any, cast

from peft.config import PeftConfig
from peft.utils import PeftType


@dataclass
class TuckAConfig(PeftConfig):
    """Hyper-parameters of one TuckA adapter.

    Raises ValueError when a size is below 1, or when t = 1 meets k > 1 (a group's single logit normalises to +-1, so
    groups would tie).
    """

    r: int = field(default=8, metadata={"help": "rank"})
    k: int = field(default=3, metadata={"help": "expert groups"})
    t: int = field(default=3, metadata={"help": "experts in a group"})
    p: int = field(default=2, metadata={"help": "slices of the core that a group's experts share"})
    alpha: float = field(default=16, metadata={"help": "scale of the change; used as is, not divided by r"})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names of the linear layers to adapt, a regex, or 'all-linear'"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "names to leave out"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "adapt these layers only"})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "name of the layer list where it is not a usual one"}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved whole"})
    bias: str = field(default="none", metadata={"help": "biases of the base to train: 'none', 'tucka_only' or 'all'"})
    router_name: str = field(default="", metadata={"help": "full name of the router (default: the first adapted)"})
    init_weights: bool = field(
        default=True, metadata={"help": "kept for the official files: the factors are drawn in any case"}
    )
    use_kaiming_init_ec: bool = field(
        default=False, metadata={"help": "draw the centroids instead of setting them from the first batch"}
    )
    ec_perturb_scale: float = field(
        default=1, metadata={"help": "half-width of the uniform noise around the first batch's mean"}
    )
    use_alb: bool = field(default=False, metadata={"help": "balance the groups without an auxiliary loss"})
    alb_gamma: float = field(default=0.001, metadata={"help": "step of the balancing bias"})
    log_expert_load: int = field(default=0, metadata={"help": "kept for the official files; statistics are always on"})
    dump_input_and_ec: bool = field(default=False, metadata={"help": "kept for the official files; not used"})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        # Registration (trainer/__init__.py) adds the member at run time.
        self.peft_type = cast(Any, PeftType)["TUCKA"]
        if isinstance(self.target_modules, list):
            self.target_modules = cast(Any, set(self.target_modules))
        for name in ("r", "k", "t", "p"):
            if getattr(self, name) < 1:
                raise ValueError(f"TuckA: {name} is {getattr(self, name)}, but it must be at least 1")
        if self.t == 1 and self.k > 1:
            raise ValueError(
                f"TuckA: t = 1 with k = {self.k} groups cannot route: a single logit normalises to +-1, so groups tie. "
                "Use t >= 2 or k = 1."
            )

    def to_dict(self) -> dict[str, Any]:
        """Exactly the official keys: the fields of newer PEFT configs, unknown to the official code, stay out."""
        out = super().to_dict()
        for name in [name for name in out if name not in OFFICIAL_KEYS]:
            del out[name]
        for name, value in out.items():
            if isinstance(value, set):
                out[name] = sorted(value)
        return out


OFFICIAL_KEYS = frozenset(
    "alb_gamma alpha auto_mapping base_model_name_or_path bias dump_input_and_ec ec_perturb_scale exclude_modules "
    "inference_mode init_weights k layers_pattern layers_to_transform log_expert_load modules_to_save p peft_type r "
    "revision router_name t target_modules task_type use_alb use_kaiming_init_ec".split()
)
