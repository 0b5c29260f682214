"""The bench itself: its command line, and that what it would time on a GPU runs."""

import importlib
import json
from itertools import islice

import pytest
import torch

from tucka_runtime.kernels.bench import __main__ as bench
from tucka_runtime.kernels.bench import chain, check, choices, model, timing
from tucka_runtime.kernels.bench.shapes import LLAMA3_8B, TINY, Measurement
from tucka_runtime.kernels.dispatch import backend
from tucka_runtime.kernels.fused import attention, norm


def sweep(name: str) -> Measurement:
    device = torch.device("cpu")
    return Measurement(TINY, (2,), (1,), (8,), (3,), (20,), torch.float32, device, backend(name))


@pytest.mark.interpreted
@pytest.mark.parametrize("op", bench.OPS)
def test_every_case_runs_fused(op: str) -> None:
    module = importlib.import_module(f"tucka_runtime.kernels.bench.{op}")
    cases = list(module.cases(sweep("fused")))
    assert cases
    for case in cases[:2]:
        assert case.op == op and case.moved > 0
        for call in case.make(0).values():
            call()
    for case in islice(module.variants(sweep("fused")), 2) if op in bench.SWEPT else ():
        case.make(0)["own"]()


@pytest.mark.interpreted
def test_the_chain_is_the_same_step_fused() -> None:
    steps = []
    for name in ("reference", "fused"):
        torch.manual_seed(3)
        steps.append(chain.Chain(sweep(name), 2, 20))
        steps[-1].adapt("all", 1, 8)
    assert torch.equal(steps[0].step(), steps[1].step())
    adapted = steps[0].step()
    assert torch.equal(adapted, steps[1].step())
    steps[0].adapt(None, 0, 0)
    assert adapted.shape == steps[0].step().shape


@pytest.mark.interpreted
def test_other_constants_make_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each kind is timed, is gone afterwards, and what does not fit is left out."""
    monkeypatch.setattr(timing, "REPEATS", 1)
    real = choices.alternatives

    def few(what: Measurement) -> dict[str, choices.Put]:
        found = real(what)
        kept = {name.split(":")[0]: name for name in found}.values()
        return {name: found[name] for name in kept} | {"broken": choices.Put(attention, "cut", None)}

    monkeypatch.setattr(choices, "alternatives", few)
    before, said = (attention.cut, norm.launch), []
    found = choices.results(sweep("fused"), 1, 4, 1, said.append)
    assert set(found) == {"as built", *few(sweep("fused")), "as built, again"} - {"broken"}
    assert any(line.startswith("broken: TypeError") for line in said) and (attention.cut, norm.launch) == before


@pytest.mark.interpreted
def test_quick_times_the_reference_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--quick", "--skip-tests", "--op", "norm", "--json"]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert "reference kernels" in found["device"] and "nothing about the fused ones" in out.err
    assert set(found["results"]["norm"][0]["micros"]) == {"own", "torch", "copy"}
    assert bench.main(["--quick", "--skip-tests", "--op", "norm"]) == 0
    assert "×copy" in capsys.readouterr().out


@pytest.mark.interpreted
def test_without_a_gpu_it_times_nothing_large(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--op", "norm"]) == 1
    assert "no GPU" in capsys.readouterr().err


def test_an_op_whose_tests_fail_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "passes", lambda op, device: "its tests do not pass")
    assert bench.run("norm", sweep("reference"), skip_tests=False, configurations=False) == []
    assert "norm is not timed" in capsys.readouterr().err


def test_the_model_counts_what_the_shape_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert model.weights(LLAMA3_8B) == 2 * (32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096)
    assert model.kv(LLAMA3_8B, 64, 1024) == 64 * 1024 * 32 * 2 * 8 * 128 * 2
    assert model.factors(LLAMA3_8B, "qv", 1, 16) == 32 * 16 * (2 * 4096 + 4096 + 1024) * 2
    assert bench.main(["--model"]) == 0
    assert "Llama-3-8B: copy 3.0 TB/s" in capsys.readouterr().out
