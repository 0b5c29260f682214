"""Weighted lists of adapters that requests asked for, each as one adapter of its own.

A combination is nobody's name. It is made when it is first asked for, has a slot or a place in the host cache like any
adapter, and is forgotten with the first of its adapters that goes. Of weights there is no end, so there is a bound: the
one used least recently makes room for the next, and where all are in use the next is refused. A client that tries many
neither pushes everybody's adapters out of slots and host cache nor puts a row of them before theirs.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from tucka_runtime.errors import InvalidRequestError, OverloadedError
from tucka_runtime.messages import AdapterKey
from tucka_runtime.names import combined_name
from tucka_runtime.server.service.leases import Combination, Leases, LoadedAdapter

MAX_KNOWN = 64
SLOTS_EACH = 4
"""There are at most MAX_KNOWN combinations, and one for so many slots: the others are left to adapters with names."""

Made = tuple[tuple[AdapterKey, int | None, float], ...]
"""What a combination is known by: its adapters' generations, members and weights, in one order whoever asks."""


class Combinations:
    """Combinations by what they are made of, of a server with so many `slots`. `next_generation` numbers them."""

    def __init__(self, slots: int, next_generation: Callable[[], int], leases: Leases):
        self._next_generation, self._leases = next_generation, leases
        self._most = max(1, min(slots // SLOTS_EACH, MAX_KNOWN))
        self._known: OrderedDict[Made, Combination | InvalidRequestError] = OrderedDict()
        """An error: what the engine said when it was to make it."""

    def of(self, parts: Sequence[tuple[LoadedAdapter, float]]) -> Combination:
        """The combination of adapters with their weights. Raises InvalidRequestError where there cannot be one: of what
        their files tell, once the engine was to make it. Raises OverloadedError where as many as there may be are in
        use."""
        ordered = sorted(parts, key=lambda part: (part[0].model, part[0].key.generation))
        made: Made = tuple([(adapter.key, adapter.member, weight) for adapter, weight in ordered])
        if (found := self._known.get(made)) is not None:
            self._known.move_to_end(made)
            if isinstance(found, InvalidRequestError):
                raise type(found)(found.message, found.param)
            return found
        if len({one[:2] for one in made}) < len(made):
            raise InvalidRequestError("`adapters` has the same adapter twice. Add up its weights.", "adapters")
        if len(self._known) >= self._most:
            self._drop(self._idle())
        key = AdapterKey(combined_name(adapter.key.name for adapter, _ in ordered), self._next_generation())
        self._known[made] = new = Combination(key, tuple(ordered))
        return new

    def refuse(self, combination: Combination, error: InvalidRequestError) -> None:
        """The engine cannot make it: nobody need ask again."""
        made = next((made for made, known in self._known.items() if known is combination), None)
        if made is not None:
            self._known[made] = error
            self._leases.retire(combination.key)

    def forget(self, key: AdapterKey) -> None:
        """A generation of an adapter goes, and all that was made of it."""
        for made in [made for made in self._known if any(own == key for own, _, _ in made)]:
            self._drop(made)

    def _idle(self) -> Made:
        """The one used least recently, of those that no request uses."""
        for made, known in self._known.items():
            if isinstance(known, InvalidRequestError) or not self._leases.held(known.key):
                return made
        raise OverloadedError(
            f"{self._most} other combinations of adapters are in use, which is as many as there may be at once with "
            "this server's --adapter-slots. Try again later, or use one of the same weights as others do.",
            "adapters",
            retry_after=1,
        )

    def _drop(self, made: Made) -> None:
        known = self._known.pop(made)
        if isinstance(known, Combination):
            self._leases.retire(known.key)
