"""What the native kernels alone promise: the same bits on any number of threads, whoever else computes, one OpenMP
runtime, random numbers."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support import delta_cases
from tests.support.route_cases import caches, routed, shuffled
from tucka_runtime.kernels import dispatch
from tucka_runtime.kernels.native import library
from tucka_runtime.kernels.native.linear import PanelLinear
from tucka_runtime.kernels.reference import sample as sample_ref
from tucka_runtime.kernels.tables.blocks import AttentionMetadata
from tucka_runtime.kernels.tables.routes import RoutePlan

native = pytest.mark.native


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restores the number of torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def on_one_and_three(run: Callable[[], list[Tensor]]) -> None:
    """Results have the same bits on one thread and on three."""
    torch.set_num_threads(1)
    alone = run()
    torch.set_num_threads(3)
    for _ in range(3):
        assert all(torch.equal(mine, true) for mine, true in zip(run(), alone, strict=True))


@native
def test_a_delta_has_the_same_bits_on_any_number_of_threads() -> None:
    case = delta_cases.make(
        [[16, 16], [12, 8]], (50, ((90, 0), (1, 1), (30, 1))), d_in=512, widths=(256, 256), core_size=16
    )
    ops = dispatch.backend("native")
    residual, weight = torch.randn_like(case.y), torch.rand(512)

    def run() -> list[Tensor]:
        low_rank = ops.shrink_core(case.x, case.site, case.cores, case.plan)
        sums = ops.expand_residual(case.y, low_rank, residual, weight, None, 1e-5)
        return [ops.expand(case.y.clone(), low_rank), ops.expand_swiglu(case.y, low_rank), *sums]

    on_one_and_three(run)
    low_rank = ops.shrink_core(case.x, case.site, case.cores, case.plan)
    delta_cases.check_delta(case, 1e-5, ops.shrink_core, ops.expand)
    assert low_rank.h.dtype == torch.float32


@native
def test_attention_has_the_same_bits_on_any_number_of_threads() -> None:
    """Contexts of one split and of several, decoding and as prompts; a window that begins within a split."""
    plan, slots, total = shuffled([(1, 1300), (1, 40), (200, 260), (1, 512), (1, 513)], 16)
    k, v = caches(slots, 16, 2, 64, torch.bfloat16)
    q = torch.randn(total, 6, 64).bfloat16()
    ops = dispatch.backend("native")
    on_one_and_three(lambda: [ops.attention(q, k, v, plan, 0.1, window) for window in (None, 700)])
    reference = dispatch.backend("reference")
    for window in (None, 700):
        want = reference.attention(q.double(), k.double(), v.double(), plan, 0.1, window)
        got = ops.attention(q, k, v, plan, 0.1, window)
        assert max(delta_cases.relative(mine, true) for mine, true in zip(got, want, strict=True)) <= 5e-3


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_has_the_same_bits_however_it_is_cut(dtype: torch.dtype) -> None:
    """Under a window too, which begins at another key for each row."""
    ops = dispatch.backend("native")
    length, blocks = 300, 19
    k, v = caches([list(range(length))], 16, 2, 64, dtype)
    q = torch.randn(length, 4, 64).to(dtype)

    def part(begin: int, end: int, window: int | None) -> Tensor:
        cpu = torch.device("cpu")
        plan = AttentionMetadata.build([(0, end - begin, end)], [list(range(blocks))], 16, cpu)
        return ops.attention(q[begin:end].contiguous(), k, v, plan, 0.125, window)

    for window in (None, 100):
        whole = part(0, length, window)
        for cut in (37, 64, 100, 161):
            assert torch.equal(torch.cat([part(0, cut, window), part(cut, length, window)]), whole), (window, cut)


@native
def test_a_long_prompts_route_is_exact() -> None:
    """One token 100,000 times: its logits' mean is what they are."""
    ids, adapter = torch.zeros(100_000, dtype=torch.int64), routed(4, 3, 50)
    plan = RoutePlan.build([adapter], [0], [ids], [None], torch.device("cpu"))
    dispatch.backend("native").route_ids(plan)
    group, weights = dispatch.backend("reference").select(adapter.table[:1], 3)
    assert torch.equal(plan.groups, group)
    torch.testing.assert_close(plan.weights, weights, rtol=0, atol=1e-6)


@native
def test_threads_that_cannot_be_made_are_done_without() -> None:
    """And are made once they can be: a loop under a limit of memory, and one after it."""
    script = """if True:
        import os, re, resource, torch
        from pathlib import Path
        from tucka_runtime.kernels import dispatch
        torch.set_num_threads(3)
        x, weight = torch.randn(4096, 256), torch.ones(256)
        norm = dispatch.backend("native").norm
        want = dispatch.backend("reference").norm(x, weight, None, 1e-6)
        before = len(os.listdir("/proc/self/task"))
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        size = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        resource.setrlimit(resource.RLIMIT_AS, (size + 6 * 2**20, hard))
        limited = norm(x, weight, None, 1e-6)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        assert len(os.listdir("/proc/self/task")) == before, "the limit limits nothing"
        for each in (limited, norm(x, weight, None, 1e-6)):
            torch.testing.assert_close(each, want)
        assert len(os.listdir("/proc/self/task")) == before + 2
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@native
def test_weights_of_a_norm_that_lie_apart_are_refused() -> None:
    norm, x = dispatch.backend("native").norm, torch.randn(2, 4)
    for weight in (torch.ones(8)[::2], torch.ones(3)):
        with pytest.raises(ValueError, match="a norm's weights"):
            norm(x, weight, None, 1e-6)


@native
def test_tokens_of_a_large_vocabulary_are_the_references() -> None:
    """Several spans of a row, on several threads; the last logits among those that are chosen."""
    logits = torch.randn(6, 20_011) * 3
    logits[2, -1] = 30.0
    logits[3] = -math.inf
    temperature = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.7, 2.0])
    seed, position = torch.arange(6) * 977 - 4000, torch.arange(6)
    ops = dispatch.backend("native")
    on_one_and_three(lambda: [ops.sample(logits, temperature, seed, position)])
    assert torch.equal(
        ops.sample(logits, temperature, seed, position), sample_ref.sample(logits, temperature, seed, position)
    )


@native
def test_uniform_is_the_references_bit_for_bit() -> None:
    seed, position = torch.tensor([0, 3, -5, 2**40 + 7, -(2**62)]), torch.tensor([0, 1, 2**20, 7, 5])
    assert torch.equal(library.module().uniform(seed, position, 300), sample_ref.uniform(seed, position, 300))


@native
def test_loops_of_several_threads_at_once_do_not_meet() -> None:
    """The rows are so many that a call gives Python's lock away."""
    torch.set_num_threads(3)
    made = PanelLinear(torch.randn(700, 64), None)
    inputs = [torch.randn(100, 64) for _ in range(8)]
    alone = [made(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            assert all(map(torch.equal, pool.map(made, inputs), alone))


@native
def test_a_forked_process_computes_without_its_parents_threads() -> None:
    torch.set_num_threads(3)
    # torch's own threads do not live on: what it compares is small enough for one.
    made, x = PanelLinear(torch.randn(700, 64), None), torch.randn(40, 64)
    want = made(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(made(x), want) else 1)
    assert os.waitpid(child, 0)[1] == 0


@native
def test_no_second_openmp_runtime_is_loaded() -> None:
    """Two runtimes would have threads of their own each, which spin beside each other."""
    maps = Path("/proc/self/maps").read_text("ascii").split()
    runtimes = {name for name in maps if Path(name).name.startswith(("libgomp", "libiomp", "libomp"))}
    assert library.load() and len({name for name in runtimes if "torch" in name}) == 1
    assert not any(name.startswith(("/lib", "/usr/lib")) for name in runtimes)


@native
def test_rows_of_another_type_are_refused() -> None:
    ops = dispatch.backend("native")
    case = delta_cases.mix("half-base")
    with pytest.raises(ValueError, match="factors in the rows' type"):
        ops.shrink_core(case.x.half(), case.site, None, case.plan)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        ops.norm(torch.ones(2, 8).double(), torch.ones(8).double(), None, 1e-5)
    with pytest.raises(ValueError, match="in one type"):
        ops.norm(torch.ones(2, 8), torch.ones(8).half(), None, 1e-5)


def test_what_was_built_for_this_cpu_is_loaded() -> None:
    """One that cannot be loaded would leave every other test of these kernels out, and a server on the reference."""
    built = [name for name in library.capabilities() if library.path_of(name).is_file()]
    if not built:
        pytest.skip("the native kernels are not built here")
    assert library.load() == built[0]


def test_a_machine_without_them_serves_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says so to who asks for them by name."""
    monkeypatch.setattr(library, "load", lambda: None)
    cpu = torch.device("cpu")
    assert dispatch.choose(cpu).name == "reference"
    with pytest.raises(dispatch.BackendUnavailableError, match="not built"):
        dispatch.choose(cpu, "native")


@native
def test_auto_takes_them_on_a_cpu() -> None:
    assert dispatch.choose(torch.device("cpu")).name == "native"
    with pytest.raises(dispatch.BackendUnavailableError, match="run on a CPU"):
        dispatch.choose(torch.device("cuda"), "native")
