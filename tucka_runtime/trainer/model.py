"""The tuner: puts TuckA layers into a model and hands each forward's attention mask to the routers."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tucka_runtime.messages import ROUTE_PREFIX_TOKENS
from tucka_runtime.trainer.config import TuckAConfig
from tucka_runtime.trainer.layer import TuckALinear
from tucka_runtime.trainer.routing import SCOPES, UNLEARNT, TrainingRouter, packed_records

# What an adapter adapts when its config names nothing: what LoRA does, the attention's query and value projections.
DEFAULT_TARGETS: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING | {
    "vit": ["query", "value", "q_proj", "v_proj"],  # named so before and since a Transformers 5 release
}


class TuckAModel(BaseTuner):
    """A model with TuckA adapters; made by `get_peft_model` and `PeftModel.from_pretrained`."""

    prefix: str = "tucka_"
    tuner_layer_cls = TuckALinear
    target_module_mapping = DEFAULT_TARGETS

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        # Set before Module.__init__ runs: injection needs it, and it holds no tensors.
        object.__setattr__(self, "routers", {})
        object.__setattr__(self, "_whole", False)  # a forward of the whole model is under way
        encodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        object.__setattr__(self, "_encodes", encodes)
        super().__init__(model, *args, **kwargs)
        model.register_forward_pre_hook(self.begin_forward, with_kwargs=True)
        model.register_forward_hook(self.end_forward, always_call=True)
        if self._encodes:
            encoder = model.get_encoder()  # type: ignore[operator]
            encoder.register_forward_pre_hook(self.begin_encoder, with_kwargs=True)
            encoder.register_forward_hook(self.end_encoder)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: TuckAConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        self.routers[adapter_name] = TrainingRouter(config.k, config.t, config.alb_gamma if config.use_alb else None)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not self.routers[adapter_name].module:
            raise ValueError(
                f"TuckA: router_name {config.router_name!r} is not an adapted module. Name one of "
                f"{', '.join(self.targeted_module_names[:4])}, ..."
            )
        if not config.router_name:
            self._route_by_query(model, config, adapter_name)

    def _route_by_query(self, model: nn.Module, config: TuckAConfig, adapter_name: str) -> None:
        """The router must be what runs first. Attentions that have their projections in another order (OPT, GPT-J,
        BART: key, value, query) run the query's first all the same; the config then names it."""
        router = self.routers[adapter_name]
        query = f"{router.module.rpartition('.')[0]}.q_proj"
        layer = dict(model.named_modules()).get(query)
        if isinstance(layer, TuckALinear) and adapter_name in layer.tucka_u and query != router.module:
            first: TuckALinear = model.get_submodule(router.module)  # type: ignore[assignment]
            layer.tucka_ec[adapter_name] = first.tucka_ec.pop(adapter_name)
            config.router_name = router.module = query

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.routers.pop(adapter_name, None)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT asks this for a parameter's name in the file, to write it and to find it again. Where another method's
        layer was put around this one's, the file has the names that it has without."""
        named: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return re.sub(r"\.base_layer\.(?=tucka_|base_layer\.)", ".", named)

    def _create_and_replace(  # type: ignore[override]
        self,
        config: TuckAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        router = self.routers[adapter_name]
        is_router = current_key == config.router_name if config.router_name else not router.module
        if is_router:
            router.module = current_key
        if isinstance(target, TuckALinear):
            target.update_layer(adapter_name, config, is_router, config.inference_mode)
            return
        if isinstance(target, BaseTunerLayer):
            raise ValueError(
                f"TuckA: {current_key} already has an adapter of another method, around which TuckA cannot be put, "
                "because it changes the layer's input. Put TuckA into the base first, then the other method around it."
            )
        if not isinstance(target, nn.Linear | Conv1D):
            raise ValueError(
                f"TuckA: {current_key} is a {type(target).__name__}, but only Linear and Conv1D layers can be adapted. "
                "Take it out of target_modules."
            )
        layer = TuckALinear(target, current_key, self.routers)
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, config, is_router, config.inference_mode)
        layer.train(target.training)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def begin_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the wrapped model: padding and labels decide which tokens count in the route. Where an
        encoder ran before, as in `generate`, its last route is the one."""
        self._whole = True
        self._begin(args, kwargs)

    def begin_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The same of an encoder, where it is called by itself."""
        if not self._whole:
            self._begin(args, kwargs)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        if mask is None and len(args) > 1 and isinstance(args[1], Tensor):
            mask = args[1]
        length = next((kwargs[n].shape[1] for n in ("input_ids", "inputs_embeds") if kwargs.get(n) is not None), None)
        if length is None and args and isinstance(args[0], Tensor) and args[0].ndim >= 2:
            length = args[0].shape[1]
        cache = kwargs.get("past_key_values")
        decoding = cache is not None and cache.get_seq_length() > 0
        counts: Tensor | None = None
        if isinstance(mask, Tensor) and mask.ndim == 2 and length is not None:
            counts = mask[:, -length:].bool()  # with a cache the mask covers earlier tokens too
        prompt = None
        # An encoder's tokens are all prompt: labels are the decoder's.
        if not self._encodes and isinstance(labels, Tensor) and labels.ndim == 2 and labels.shape[1] == length:
            prompt = (labels != UNLEARNT).cumsum(1) == 0
        records, positions = None, kwargs.get("position_ids")
        if mask is None and cache is None and isinstance(positions, Tensor) and positions.ndim == 2:
            given = labels if prompt is not None else None
            if packed := packed_records(positions, given):
                records, counts, prompt = packed
        encoded = next(_tensors(kwargs.get("encoder_outputs")), None)
        for router in self.routers.values():
            router.begin(counts, prompt, decoding, records, None if encoded is None else len(encoded))

    def end_encoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """`end_forward` of an encoder that was called by itself."""
        if not self._whole:
            self._end(output)

    def end_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: when this forward is differentiated, other forwards may have come after it (a loss of two
        forwards, a reference model). Gradient checkpointing then runs layers again, and they need its routes."""
        self._whole = False
        self._end(output)

    def _end(self, output: Any) -> None:
        forwards = [(router, router.current) for router in self.routers.values()]
        for router, _ in forwards:
            router.end()

        def back(_: Tensor) -> None:
            for router, forward in forwards:
                router.current, forward.calls = forward, 0

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(back)


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in a model's output: a tensor, or a tuple or mapping of outputs."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def routers(model: nn.Module) -> dict[str, TrainingRouter]:
    """The routers of every adapter in a model that holds a TuckAModel (a PeftModel, say).

    Raises ValueError when there is none.
    """
    for module in model.modules():
        if isinstance(module, TuckAModel):
            found: dict[str, TrainingRouter] = module.routers
            return found
    raise ValueError("The model has no TuckA adapter. Make one with get_peft_model(model, TuckAConfig(...)).")


def set_route_scope(
    model: nn.Module,
    scope: str,
    adapters: Iterable[str] | None = None,
    prefix_tokens: int = ROUTE_PREFIX_TOKENS,
) -> None:
    """Choose which tokens share a route (routing.SCOPES), for all adapters or those named; under "prefix" those are the
    first `prefix_tokens` of each prompt."""
    if scope not in SCOPES:
        raise ValueError(f"The route scope is one of {', '.join(SCOPES)}, not {scope!r}.")
    found = routers(model)
    for name in found if adapters is None else adapters:
        found[name].scope, found[name].prefix_tokens = scope, prefix_tokens


@torch.no_grad()
def centroids(model: nn.Module, adapter: str) -> Tensor:
    """The adapter's centroids (k·t, d), detached."""
    for module in model.modules():
        if isinstance(module, TuckALinear) and adapter in module.tucka_ec:
            found: Tensor = module.tucka_ec[adapter].detach()
            return found
    raise ValueError(f"No TuckA adapter named {adapter!r} in the model.")
