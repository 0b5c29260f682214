"""Weighted lists of adapters that requests asked for, each as one adapter of its own.

A combination is nobody's name. It is made when it is first asked for, has a slot or a place in the host cache like any
adapter while it is used, and is forgotten with the first of its adapters that goes.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.messages import AdapterKey
from tucka_runtime.names import combined_name
from tucka_runtime.server.service.leases import Combination, LoadedAdapter

MAX_KNOWN = 64
"""Combinations that are there at once, but for those in use: of weights there is no end, and a client that tries many
is not to push everybody's adapters out of slots and host cache."""

Made = tuple[tuple[AdapterKey, int | None, float], ...]
"""What a combination is known by: its adapters' generations, members and weights, in one order whoever asks."""


class Combinations:
    """Combinations by what they are made of. `next_generation` numbers them, `retire` has one leave the engine."""

    def __init__(self, next_generation: Callable[[], int], retire: Callable[[AdapterKey], object]):
        self._next_generation, self._retire = next_generation, retire
        self._known: OrderedDict[Made, Combination | InvalidRequestError] = OrderedDict()
        """An error: what the engine said when it was to make it."""

    def of(self, parts: Sequence[tuple[LoadedAdapter, float]]) -> Combination:
        """The combination of adapters with their weights. Raises InvalidRequestError where there cannot be one: of what
        their files tell, once the engine was to make it."""
        ordered = sorted(parts, key=lambda part: (part[0].model, part[0].key.generation))
        made: Made = tuple([(adapter.key, adapter.member, weight) for adapter, weight in ordered])
        if (found := self._known.get(made)) is not None:
            self._known.move_to_end(made)
            if isinstance(found, InvalidRequestError):
                raise type(found)(found.message, found.param)
            return found
        if len({one[:2] for one in made}) < len(made):
            raise InvalidRequestError("`adapters` has the same adapter twice. Add up its weights.", "adapters")
        key = AdapterKey(combined_name(adapter.key.name for adapter, _ in ordered), self._next_generation())
        self._known[made] = new = Combination(key, tuple(ordered))
        if len(self._known) > MAX_KNOWN:
            self._drop(next(iter(self._known)))
        return new

    def refuse(self, combination: Combination, error: InvalidRequestError) -> None:
        """The engine cannot make it: nobody need ask again."""
        made = next((made for made, known in self._known.items() if known is combination), None)
        if made is not None:
            self._known[made] = error
            self._retire(combination.key)

    def forget(self, key: AdapterKey) -> None:
        """A generation of an adapter goes, and all that was made of it."""
        for made in [made for made in self._known if any(own == key for own, _, _ in made)]:
            self._drop(made)

    def _drop(self, made: Made) -> None:
        known = self._known.pop(made)
        if isinstance(known, Combination):
            self._retire(known.key)
