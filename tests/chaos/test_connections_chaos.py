"""Every kind of hostile client, for a short time; `tests/chaos/connections.py` by hand for a long one."""

import pytest

from tests.chaos.connections import KINDS, run


@pytest.mark.parametrize(
    ("kind", "count", "seconds"),
    [("never_readers", 4, 1), ("disconnects", 40, 0), ("malformed", 100, 0), ("descriptors", 20, 3)],
)
def test_it_holds(kind: str, count: int, seconds: float) -> None:
    assert run(kind, count, seconds)


def test_no_kind_is_left_out() -> None:
    assert set(KINDS) == {"never_readers", "disconnects", "malformed", "descriptors"}
