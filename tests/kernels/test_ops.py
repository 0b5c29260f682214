"""Every backend keeps the contract of kernels/ops.py: the same ops with the same arguments."""

import inspect
import typing
from dataclasses import fields

import pytest

from tucka_runtime.kernels.dispatch import BACKENDS, backend
from tucka_runtime.kernels.ops import Ops

OPS = [f.name for f in fields(Ops) if f.type not in ("str", "bool", str, bool)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", BACKENDS)
def test_an_op_takes_and_gives_what_its_contract_says(name: str, op: str) -> None:
    contract = typing.get_type_hints(Ops)[op].__call__
    own = getattr(backend(name), op)
    promised = list(inspect.signature(contract, eval_str=True).parameters.values())[1:]  # without self
    assert list(inspect.signature(own, eval_str=True).parameters.values()) == promised
    assert typing.get_type_hints(own)["return"] == typing.get_type_hints(contract)["return"]


@pytest.mark.parametrize("op", OPS)
def test_every_contract_is_explained(op: str) -> None:
    assert len(inspect.getdoc(typing.get_type_hints(Ops)[op]) or "") > 60


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_has_its_own_name(name: str) -> None:
    assert backend(name).name == name
