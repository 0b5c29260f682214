"""The adapted linear layer: y = base(x + alpha · x Û M Ûᵀ), with the routed core M (paper, eq. 3-5).

Û = u / ‖u‖_F        Ĉ = c / ‖c‖_F        Ĝ = g[group] / ‖g[group]‖_F (over the group's whole (p, r, r) block)
M = Σ_i s_i Σ_j Ĉ[i, j] Ĝ[j]
"""

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tucka_runtime.trainer.config import TuckAConfig
from tucka_runtime.trainer.routing import TrainingRoute, TrainingRouter


def features(layer: nn.Module) -> tuple[int, int]:
    """Input and output features of a linear layer: a Conv1D stores (in, out), and has no other names for them."""
    sizes = layer.weight.shape if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
    return sizes[0], sizes[1]  # type: ignore[return-value]


def unit(x: Tensor, dims: int | None = None) -> Tensor:
    """x over its L2 norm, over all entries or over the last `dims` dimensions."""
    over = None if dims is None else tuple(range(-dims, 0))
    norm: Tensor = torch.linalg.vector_norm(x, dim=over, keepdim=dims is not None)
    return x / norm


def routed_delta(x: Tensor, u: Tensor, c: Tensor, g: Tensor, route: TrainingRoute) -> Tensor:
    """x Û M Ûᵀ for x (B, …, d), u (d, r), c (t, p), g (k, p, r, r); the factors are normalised in fp32, then cast.

    Û is laid out as (r, d): with 8 columns instead of rows, a CPU's products and their gradients take twice as long.
    """
    with torch.autocast(x.device.type, enabled=False):  # the small products stay fp32
        u_hat = unit(u.float()).to(x.dtype).T.contiguous()  # (r, d)
        mix = route.weights @ unit(c.float())  # (*lead, p)
        if route.group.numel() == 1:
            core = torch.einsum("p,pab->ab", mix.reshape(-1), unit(g[route.group.reshape(())].float())).to(x.dtype)
        elif route.group.ndim == 1:
            core = torch.einsum("bp,bpij->bij", mix, unit(g.float(), dims=3)[route.group]).to(x.dtype)
    h = x @ u_hat.T
    if route.group.numel() == 1:
        h = h @ core
    elif route.group.ndim == 1:
        h = torch.bmm(h.reshape(h.shape[0], -1, h.shape[-1]), core).view(h.shape)
    else:
        # One product for all tokens: each token's h is laid out in its group's place, weighted slice by slice.
        place = nn.functional.one_hot(route.group, g.shape[0]).to(mix.dtype)[..., None] * mix[..., None, :]
        wide = h[..., None, None, :] * place.to(h.dtype)[..., None]
        h = wide.flatten(-3) @ unit(g.float(), dims=3).to(h.dtype).flatten(0, 2)
    return h @ u_hat


def grouped_delta(x: Tensor, u: Tensor, c: Tensor, g: Tensor, alpha: Tensor, route: TrainingRoute) -> Tensor:
    """alpha · x Û M Ûᵀ of n adapters at once, for x (n, rows · S, d), u (n, d, r), c (n, t, p), g (n, k, p, r, r),
    alpha (n,). The route is one a batch (n, 1), a row (n, rows) or a token (n, rows, S) of each."""
    n, k = g.shape[:2]
    u_hat = unit(u, dims=2).to(x.dtype)
    mix = route.weights.flatten(1, -2) @ unit(c, dims=2)  # (n, routes, p)
    g_hat = unit(g, dims=3) * alpha.view(n, 1, 1, 1, 1)
    h = x @ u_hat
    if route.group.ndim == 3:
        place = nn.functional.one_hot(route.group.flatten(1), k).to(mix.dtype)[..., None] * mix[..., None, :]
        wide = h[..., None, None, :] * place.to(h.dtype)[..., None]
        h = wide.flatten(-3) @ g_hat.to(h.dtype).flatten(1, 3)
    else:
        of = (route.group + k * torch.arange(n, device=g.device)[:, None]).flatten()
        chosen = g_hat.flatten(0, 1).index_select(0, of)
        core = torch.einsum("bp,bpij->bij", mix.flatten(0, 1), chosen).to(h.dtype)
        h = torch.bmm(h.reshape(len(of), -1, h.shape[-1]), core).view(h.shape)
    return h @ u_hat.mT


class TuckALinear(nn.Module, BaseTunerLayer):
    """A Linear or Conv1D with any number of TuckA adapters. Their factors are fp32 whatever the base's type, unless
    PEFT is told autocast_adapter_dtype=False; they are normalised in fp32 in any case.

    By "Linear" in a class's name PEFT's "all-linear" finds layers that have an adapter already."""

    adapter_layer_names: tuple[str, ...] = ("tucka_g", "tucka_c", "tucka_u", "tucka_ec")
    other_param_names: tuple[str, ...] = ("tucka_config",)

    def __init__(self, base_layer: nn.Module, name: str, routers: dict[str, TrainingRouter]):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = features(self.get_base_layer())
        self.name = name
        self.routers = routers  # the model's own dict, shared by all its layers
        self.tucka_config: dict[str, TuckAConfig] = {}
        self.tucka_g = nn.ParameterDict()
        self.tucka_c = nn.ParameterDict()
        self.tucka_u = nn.ParameterDict()
        self.tucka_ec = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters = []

    def update_layer(self, adapter: str, config: TuckAConfig, is_router: bool, inference_mode: bool = False) -> None:
        """Give this layer fresh factors for `adapter`; the router module also gets centroids.

        Centroids are zero until the first forward sets them from its batch (unless use_kaiming_init_ec). So "already
        set" travels with the tensor itself: loading trained centroids can never re-initialise them.
        """
        d, r, device = self.in_features, config.r, self.weight.device
        self.tucka_config[adapter] = config

        def drawn(*shape: int, fan: int) -> Tensor:
            return torch.empty(shape, device=device).uniform_(-1 / math.sqrt(fan), 1 / math.sqrt(fan))

        first = drawn(r, r, fan=r)  # the same in every group and slice
        self.tucka_g[adapter] = nn.Parameter(first.repeat(config.k, config.p, 1, 1))
        self.tucka_c[adapter] = nn.Parameter(drawn(config.t, config.p, fan=config.t))
        self.tucka_u[adapter] = nn.Parameter(drawn(d, r, fan=d))
        if is_router:
            shape = (config.k * config.t, d)
            ec = drawn(*shape, fan=d) if config.use_kaiming_init_ec else torch.zeros(shape, device=device)
            self.tucka_ec[adapter] = nn.Parameter(ec)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(
                "TuckA: a batch that mixes adapters (adapter_names) is not supported in training, because the route "
                "belongs to a whole batch. Use set_adapter, or serve the adapters with tucka serve."
            )
        if not self.disable_adapters:
            change: Tensor | None = None
            for adapter in self.active_adapters:
                if adapter in self.tucka_u:
                    delta = self.tucka_config[adapter].alpha * self._delta(x, adapter)
                    change = delta if change is None else change + delta
            if change is not None:
                x = x + change
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y

    def routed(self, x: Tensor, adapter: str) -> TrainingRoute:
        """The adapter's route here; its router computes it from x. Raises RuntimeError where there is none yet."""
        router = self.routers[adapter]
        if adapter in self.tucka_ec:
            router.compute(x, self.tucka_ec[adapter], self.tucka_config[adapter], self.training)
        now = router.current
        if not now.fresh or now.route is None:
            raise RuntimeError(
                f"TuckA: {self.name} ran before adapter {adapter!r} was routed, because its router {router.module} "
                f"runs later in the forward pass. Set router_name to the adapted module that runs first."
            )
        if now.learns and torch.is_grad_enabled() and not now.route.weights.requires_grad:
            raise RuntimeError(
                "TuckA: the route has no graph, so its centroids would not be trained. Reentrant gradient "
                "checkpointing does this: set use_reentrant=False (gradient_checkpointing_kwargs of the Trainer)."
            )
        return now.route

    def _delta(self, x: Tensor, adapter: str) -> Tensor:
        route = self.routed(x, adapter)
        return routed_delta(x, self.tucka_u[adapter], self.tucka_c[adapter], self.tucka_g[adapter], route)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(
            "TuckA: the change depends on each batch's route, so it cannot be merged into the base's weights. "
            "Use unload() to get the base back, or serve the adapter with a pinned route."
        )

    def unmerge(self) -> None:
        raise NotImplementedError("TuckA: nothing is ever merged, so there is nothing to unmerge.")

    def __repr__(self) -> str:
        return "tucka." + super().__repr__()
