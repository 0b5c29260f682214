"""Training of TuckA adapters. Importing this package teaches `peft` the method:

    from tucka_runtime.trainer import TuckAConfig
    model = peft.get_peft_model(base, TuckAConfig(target_modules=["q_proj", "v_proj"]))

`PeftModel.from_pretrained`, `save_pretrained`, Hugging Face `Trainer` and TRL then work as for PEFT's own methods.
"""

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method


def _register() -> None:
    """Add the member TUCKA to PEFT's type enumeration and register config, tuner and key prefix; once."""
    if "TUCKA" not in PeftType.__members__:
        member = str.__new__(PeftType, "TUCKA")
        member._name_ = member._value_ = "TUCKA"
        type.__setattr__(PeftType, "TUCKA", member)
        PeftType._member_names_.append("TUCKA")
        PeftType._member_map_["TUCKA"] = member
        PeftType._value2member_map_["TUCKA"] = member
    if PeftType["TUCKA"] not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name="tucka", config_cls=TuckAConfig, model_cls=TuckAModel, prefix="tucka_")


from tucka_runtime.trainer.config import TuckAConfig  # noqa: E402
from tucka_runtime.trainer.model import TuckAModel, centroids, routers, set_route_scope  # noqa: E402

_register()

__all__ = ["TuckAConfig", "TuckAModel", "centroids", "routers", "set_route_scope"]
