"""Small plans: a profile in round numbers, and arrivals that are written out."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from tucka_runtime.planning.arrivals import Arrivals
from tucka_runtime.planning.profile import Profile
from tucka_runtime.planning.replica import ReplicaSettings

PROFILE = Profile(
    rows=[1, 2, 4],
    one_adapter=[0.010, 0.012, 0.016],
    adapters=[1, 2, 4],
    own_adapters=[0.010, 0.014, 0.022],
    prompt_tokens=[1, 100],
    prompt_seconds=[0.003, 0.102],
    load=0.5,
    load_beside=0.5,
    step_beside=1.0,
    activate=0.1,
    request=0.003,
    servers=1,
    crowded=1.0,
    adapter_bytes=1000,
    measured={},
)
"""A step of two rows takes 12 ms with one adapter, 14 ms with two; prompts add 2 ms to it, and 1 ms for each token."""

FLAT = replace(PROFILE, one_adapter=[0.010] * 3, own_adapters=[0.010] * 3, prompt_seconds=[0.0, 0.0], request=0.0)
"""Every step takes 10 ms."""


def settings(slots: int = 4, host: int = 4, max_num_seqs: int = 8, stretch: float = 0.0) -> ReplicaSettings:
    return ReplicaSettings(slots, host, max_num_seqs, decode_stretch=stretch)


def arriving(requests: Iterable[tuple[float, int, int, int]], names: Sequence[str] = "abcdefgh") -> Arrivals:
    """Of (second, adapter, prompt's tokens, answer's tokens)."""
    at, adapter, prompt, output = (list(values) for values in zip(*requests, strict=True))
    return Arrivals(at, adapter, prompt, output, tuple(names))
