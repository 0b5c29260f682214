"""One frozen base under many adapters that train: their rows go through it in one forward.

Each adapter has a PEFT model of its own, whose base is a copy of the modules on the very same weights: alone it trains,
is measured and is saved as ever. Beside these stands one more copy, the carrier. Its adapted linears run the base's
product once for the rows of all, and each adapter's low-rank products on its own rows; adapters of equal shapes go
through batched products together. The base is frozen and no row sees another, so one backward gives every adapter the
gradients that it would have alone, up to rounding.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tucka_runtime.errors import ConfigError
from tucka_runtime.trainer.answers import asked, logits_at
from tucka_runtime.trainer.layer import TuckALinear, grouped_delta
from tucka_runtime.trainer.routing import TrainingRoute

NAME = "default"  # of the adapter in each PEFT model


def clone(base: nn.Module) -> Any:
    """The modules once more, on the same weights and buffers."""
    # The state is bitsandbytes' of an 8-bit linear: the first forward moves the weight into it.
    states = (module.state for module in base.modules() if type(module).__name__ == "Linear8bitLt")
    return copy.deepcopy(base, {id(own): own for own in chain(base.parameters(), base.buffers(), states)})


class Member:
    """One adapter: its PEFT model, its layers by the base's module names, and the state of its random generator, which
    is torch's own CPU generator when the adapter trains alone."""

    def __init__(self, model: Any, router: Any):
        self.model, self.router = model, router
        self.layers: dict[str, Any] = {
            name: module
            for name, module in model.base_model.model.named_modules()
            if isinstance(module, TuckALinear | LoraLayer)
        }
        shapes = tuple(tuple(p.shape) for p in model.parameters() if p.requires_grad)
        self.shapes = (router is None, tuple(self.layers), shapes)
        self._state = torch.get_rng_state()
        self._drawn: dict[str, Tensor] = {}

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """What is drawn meanwhile comes from this adapter's generator."""
        outer = torch.get_rng_state()
        torch.set_rng_state(self._state)
        try:
            yield
        finally:
            self._state = torch.get_rng_state()
            torch.set_rng_state(outer)

    def begin(self, batch: dict[str, Tensor]) -> None:
        """A forward over these arguments, this adapter's own, starts."""
        self._drawn.clear()
        if self.router is not None:
            self.model.base_model.begin_forward(self.model, (), batch)

    def end(self, logits: Tensor) -> None:
        """The forward is over and gave these logits."""
        if self.router is not None:
            self.model.base_model.end_forward(self.model, (), logits)

    def routed(self, name: str, x: Tensor) -> TrainingRoute:
        """The route at this layer; x is what it would be given alone."""
        layer = self.layers[name]
        if NAME not in layer.tucka_ec:
            route: TrainingRoute = layer.routed(x, NAME)
            return route
        with self.drawing():  # centroids may be set, with noise
            route = layer.routed(x, NAME)
        return route

    def dropped(self, name: str, x: Tensor) -> Tensor:
        """x after LoRA's dropout at this layer; gradient checkpointing asks again and gets the same."""
        now = self._state
        again = self._drawn.setdefault(name, now)
        self._state = again
        with self.drawing():
            out: Tensor = self.layers[name].lora_dropout[NAME](x)
        if again is not now:
            self._state = now
        return out


@dataclass(frozen=True)
class Seat:
    """An adapter's part of a pass: its rows, and how wide they are without the padding that the others cause."""

    member: Member
    rows: slice
    width: int


class Group:
    """Neighbouring seats of equal shapes and numbers of rows, whose low-rank products are batched."""

    def __init__(self, seats: Sequence[Seat]):
        self.seats = seats
        self.rows = slice(seats[0].rows.start, seats[-1].rows.stop)
        self._routes: list[TrainingRoute] = []
        self._stacked: TrainingRoute | None = None

    def tucka(self, name: str, x: Tensor) -> Tensor:
        """The change of the layer's input x (rows of this group, S, d)."""
        routes = [s.member.routed(name, x[self._own(s), : s.width]) for s in self.seats]
        if self._stacked is None or any(a is not b for a, b in zip(routes, self._routes, strict=True)):
            self._routes, self._stacked = routes, _stacked(routes, x.shape[1])
        layers = [s.member.layers[name] for s in self.seats]
        u, c, g = (torch.stack([getattr(layer, f"tucka_{n}")[NAME] for layer in layers]) for n in "ucg")
        alpha = u.new_tensor([layer.tucka_config[NAME].alpha for layer in layers])
        delta = grouped_delta(x.reshape(len(layers), -1, x.shape[-1]), u, c, g, alpha, self._stacked)
        return delta.view(x.shape)

    def lora(self, name: str, x: Tensor) -> Tensor:
        """The change of the layer's output, from its input x (rows of this group, S, d)."""
        layers = [s.member.layers[name] for s in self.seats]
        a, b = (torch.stack([getattr(layer, f"lora_{n}")[NAME].weight for layer in layers]) for n in "AB")
        h = x.to(a.dtype)
        if any(isinstance(layer.lora_dropout[NAME], nn.Dropout) for layer in layers):
            h = torch.cat([self._dropped(s, name, h) for s in self.seats])
        scaling = a.new_tensor([layer.scaling[NAME] for layer in layers])[:, None, None]
        y = (h.reshape(len(layers), -1, h.shape[-1]) @ a.mT * scaling) @ b.mT
        return y.view(*x.shape[:2], -1)

    def _own(self, seat: Seat) -> slice:
        return slice(seat.rows.start - self.rows.start, seat.rows.stop - self.rows.start)

    def _dropped(self, seat: Seat, name: str, h: Tensor) -> Tensor:
        own = h[self._own(seat)]
        return torch.cat([seat.member.dropped(name, own[:, : seat.width]), own[:, seat.width :]], dim=1)


def _stacked(routes: list[TrainingRoute], width: int) -> TrainingRoute:
    """Routes of several adapters as one, with a dimension for the adapters before the others. Where they are of tokens,
    tokens beyond an adapter's own have no weights, and so no change."""
    if any(route.group.ndim == 2 for route in routes):
        routes = [_by_token(route, width) for route in routes]
    return TrainingRoute(torch.stack([r.group for r in routes]), torch.stack([r.weights for r in routes]))


def _by_token(route: TrainingRoute, width: int) -> TrainingRoute:
    group, weights = route.group, route.weights
    if group.ndim == 1:
        return TrainingRoute(group[:, None].expand(-1, width), weights[:, None].expand(-1, width, -1))
    more = width - group.shape[1]
    return TrainingRoute(nn.functional.pad(group, (0, more)), nn.functional.pad(weights, (0, 0, 0, more)))


class CarrierLinear(nn.Module):
    """A linear of the base in the carrier: y = W(x + TuckA's changes) + LoRA's changes, each for its own rows."""

    carrier: "Carrier"

    def __init__(self, linear: nn.Module, name: str, carrier: "Carrier"):
        super().__init__()
        self.linear, self.name = linear, name
        self.__dict__["carrier"] = carrier  # no submodule of this one: it holds this one

    def forward(self, x: Tensor) -> Tensor:
        groups = self.carrier.groups
        if x.ndim != 3 or x.shape[:2] != self.carrier.shape:
            raise ConfigError(f"This base does not keep rows apart at {self.name}: train its adapters one by one.")
        before: list[Tensor | None] = [None] * len(groups)
        after = list(before)
        for i, group in enumerate(groups):
            member = group.seats[0].member
            if self.name in member.layers:
                change = group.lora if member.router is None else group.tucka
                (after if member.router is None else before)[i] = change(self.name, x[group.rows])
        y: Tensor = self.linear(_plus(x, before, groups))
        return _plus(y, after, groups)


def _plus(x: Tensor, changes: list[Tensor | None], groups: list[Group]) -> Tensor:
    """x with each group's change on its rows; changes may be of a wider type than x."""
    if all(change is None for change in changes):
        return x
    whole = [
        x.new_zeros((group.rows.stop - group.rows.start, *x.shape[1:])) if change is None else change
        for group, change in zip(groups, changes, strict=True)
    ]
    return (x + (whole[0] if len(whole) == 1 else torch.cat(whole))).to(x.dtype)


class Carrier:
    """The base through which the rows of all `members` go together. Raises ConfigError for a base that draws dropout of
    its own, which would not be what each adapter draws alone, or that does not keep rows apart."""

    def __init__(self, base: nn.Module, members: Sequence[Member]):
        self.model = clone(base)
        self.groups: list[Group] = []
        self.shape = torch.Size()
        for name in sorted({name for member in members for name in member.layers}):
            parent, _, child = name.rpartition(".")
            linear = self.model.get_submodule(name)
            setattr(self.model.get_submodule(parent), child, CarrierLinear(linear, name, self))
        self.model.train()
        config = self.model.config.get_text_config()
        drawn = [
            n for n in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob") if getattr(config, n, 0)
        ]
        drawn += [name for name, module in self.model.named_modules() if isinstance(module, nn.Dropout) and module.p]
        if drawn:
            raise ConfigError(
                f"This base has dropout of its own ({drawn[0]}), which jobs in one pass would not draw as alone. "
                "Set it to 0 in its config.json, or train one by one."
            )  # fmt: skip
        with torch.no_grad():
            self.shape = torch.Size((2, 3))
            self.model(input_ids=torch.tensor([[1, 2, 3]] * 2, device=self.model.device), use_cache=False)

    def forward(self, batches: Sequence[tuple[Member, dict[str, Tensor]]], pad: int) -> list[Tensor]:
        """Logits of the learnt tokens (N, V) of each member's batch, in the order given. All batches are packed, or
        none is."""
        order = sorted(range(len(batches)), key=lambda i: repr(_likeness(*batches[i])))
        width = max(batch["input_ids"].shape[1] for _, batch in batches)
        seats, at = [], 0
        for member, batch in (batches[i] for i in order):
            rows, own = batch["input_ids"].shape
            seats.append(Seat(member, slice(at, at + rows), own))
            at += rows
            member.begin(batch)
        alike = [_likeness(*batches[i]) for i in order]
        self.groups = [
            Group([seat for _, seat in pairs])
            for _, pairs in groupby(zip(alike, seats, strict=True), key=lambda pair: pair[0])
        ]
        self.shape = torch.Size((at, width))
        fills = {"input_ids": pad, "attention_mask": 0, "position_ids": 0}
        joint = {
            name: torch.cat([_wide(batches[i][1][name], width, fills[name]) for i in order])
            for name in batches[0][1]
            if name in fills
        }
        where = [_wide(asked(batches[i][1]["labels"]), width, False) for i in order]
        logits = logits_at(self.model, torch.cat(where), lambda: self.model(**joint, use_cache=False).logits)
        found: list[Any] = [None] * len(batches)
        own = logits.split([int(each.sum()) for each in where])
        for i, seat, found[i] in zip(order, seats, own, strict=True):
            seat.member.end(found[i])
        return found


def _likeness(member: Member, batch: dict[str, Tensor]) -> tuple[Any, ...]:
    """Equal for what can be in one group: shapes, rows, and the kind of route."""
    scope = None if member.router is None else member.router.scope == "batch"
    return member.shapes, batch["input_ids"].shape[0], scope


def _wide(x: Tensor, width: int, fill: int) -> Tensor:
    return nn.functional.pad(x, (0, width - x.shape[1]), value=fill)
