"""Rows of a batch that share an adapter and a route, and where those routes come from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from tucka_runtime.engine.adapters.active import ActiveSet
from tucka_runtime.kernels.tables.routes import CoreParts, RoutePlan
from tucka_runtime.messages import AdapterKey, Route


@dataclass(eq=False)
class Segment:
    """Rows first..end of a batch that share an adapter and a route, or the `member` of a bank.

    The route is `given`, or comes from the tokens `ids`, or, where the adapter has no table of them, from the router's
    inputs. `ids` are those of the `prompt`, the tokens that a sequence of its own is routed by, if there is one, else
    of the rows (None: not looked up so far); router inputs are those of the same tokens.
    """

    first: int
    end: int
    adapter: AdapterKey
    given: Route | None = None
    prompt: list[int] | None = None
    member: int | None = None
    ids: Tensor | None = None

    @property
    def routed_end(self) -> int:
        """The end of the rows whose router inputs are the route's. All of a prompt's tokens that count are in its first
        chunk where it is not routed before (ModelRunner._start_routing)."""
        return self.end if self.prompt is None else self.first + len(self.prompt)


@dataclass(eq=False)
class RouteSum:
    """The sum of router inputs over the chunks of a long prompt: `total` (d,) fp32 of `count` rows, this pass's being
    first..end. Those rows go through the pass as base rows: before its router an adapter changes nothing."""

    adapter: AdapterKey
    first: int = 0
    end: int = 0
    count: int = 0
    total: Tensor | None = None

    def restart(self) -> None:
        """Forgets what was summed up: the prompt begins again, as after a preemption."""
        self.total, self.count = None, 0

    def add(self, x: Tensor) -> None:
        """Takes this pass's rows out of the router's inputs x (T, d)."""
        total = x[self.first : self.end].float().sum(dim=0)
        self.total = total if self.total is None else self.total + total
        self.count += self.end - self.first


@dataclass(eq=False)
class Routes:
    """The routes of some segments, as they become known: groups (S,) int64, weights (S, at least t), on the device."""

    segments: list[int]
    experts: list[int]
    """t of each."""
    groups: Tensor
    weights: Tensor

    def to_host(self) -> "Routes":
        """A copy that is on the host once the device has come so far."""
        groups, weights = (x.to("cpu", non_blocking=True, copy=True) for x in (self.groups, self.weights))
        return Routes(self.segments, self.experts, groups, weights)

    def items(self) -> Iterator[tuple[int, Route]]:
        """Each segment's route, from the host's copy."""
        rows = zip(self.segments, self.experts, self.groups.tolist(), self.weights.tolist(), strict=True)
        return ((s, Route(group, tuple(weights[:t]))) for s, t, group, weights in rows)


def core_rows(segments: Sequence[Segment], active: ActiveSet, identity: int | None = None) -> list[int]:
    """Which core each segment takes: its own where that depends on a route or a member, else the one at `identity`,
    which lies right behind the others where it is not given."""
    routed = [active.folded[s.adapter].core_rank > 0 for s in segments]
    own, constant = count(), sum(routed) if identity is None else identity
    return [next(own) if r else constant for r in routed]


def write_identities(segments: Sequence[Segment], rows: Sequence[int], active: ActiveSet, cores: Tensor) -> None:
    """Makes the cores of combinations with a router identities, in whose corner their routes will make a core."""
    for row, segment in zip(rows, segments, strict=True):
        if active.folded[segment.adapter].mixed:
            cores[row] = torch.eye(cores.shape[-1], dtype=cores.dtype, device=cores.device)


def write_members(segments: Sequence[Segment], rows: Sequence[int], active: ActiveSet, cores: Tensor) -> None:
    """Puts the cores of the banks' members into those that the segments take, `rows` of cores (C, every linear, R, R):
    bank by bank, whatever the number of members."""
    own: dict[AdapterKey, list[int]] = {}
    for s, segment in enumerate(segments):
        if segment.member is not None:
            own.setdefault(segment.adapter, []).append(s)
    for key, places in own.items():
        bank = active.folded[key].bank
        assert bank is not None
        members = [member for s in places if (member := segments[s].member) is not None]
        bank.write(members, [rows[s] for s in places], cores)


def route_plan(
    parts: Sequence[CoreParts], rows: Sequence[int], segments: Sequence[Segment], device: torch.device
) -> RoutePlan:
    """What the kernels need to know of segments whose route is given or known from their token ids."""
    ids = [None if s.given is not None else s.ids for s in segments]
    known = [None if s.given is None else (s.given.group, s.given.weights) for s in segments]
    return RoutePlan.build(parts, rows, ids, known, device)
