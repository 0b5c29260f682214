"""Every kernel compiles for the GPU it is written for, which takes no GPU; the compiler's report tells how well."""

import json
import os
import subprocess
import sys

import pytest

from tucka_runtime.kernels.bench import ptx

EXPANDS = ("_expand", "_qkv", "_swiglu", "_add")


@pytest.fixture(scope="module")
def report() -> list[dict[str, object]]:
    """One entry per kernel and shape (kernels/bench/compiled.py), from a process without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tucka_runtime.kernels.bench", "--compile", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    entries: list[dict[str, object]] = json.loads(done.stdout)["compiled"]
    return entries


def test_every_op_compiles(report: list[dict[str, object]]) -> None:
    from tucka_runtime.kernels.bench.__main__ import OPS

    assert {str(entry["op"]).split(" ")[0].split(",")[0] for entry in report} >= set(OPS) - {"route"}


def test_nothing_is_spilled(report: list[dict[str, object]]) -> None:
    assert not [entry for entry in report if entry["spilled"]]


@pytest.mark.parametrize(("kernel", "pointer"), [("_shrink", "u_at"), *((k, "e_at") for k in EXPANDS)])
def test_factors_are_read_in_16_bytes(report: list[dict[str, object]], kernel: str, pointer: str) -> None:
    """No hint on alignment has been lost: then a factor would be read by dozens of 2-byte loads."""
    for widths in accesses(report, kernel, pointer):
        assert set(widths) == {"16"}


@pytest.mark.parametrize("kernel", EXPANDS)
def test_h_is_read_as_wide_as_a_thread_has_of_it(report: list[dict[str, object]], kernel: str) -> None:
    """A tile's h are 16 rows of 16 ranks: two elements, 4 bytes, for each of 128 threads; more in a prompt's tile. Also
    where its width is no multiple of 16, of which the compiler knows only by a hint."""
    assert any(entry["kernel"] == kernel and "rank 8" in str(entry["op"]) for entry in report)
    for widths in accesses(report, kernel, "h_at"):
        assert min(map(int, widths)) >= 4


def test_slices_of_cores_are_read_in_16_bytes(report: list[dict[str, object]]) -> None:
    """The kernel has both ways: 16 bytes where the rank is a multiple of 4, 8 entries of 4 bytes where it is not."""
    assert accesses(report, "_core", "slices") == [{"4": 8, "16": 2}]
    for widths in accesses(report, "_finish", "core_at"):
        assert min(map(int, widths)) >= 4


def test_parts_of_a_context_are_read_eight_at_once(report: list[dict[str, object]]) -> None:
    """In both merges of the tree, 16 bytes each, beside what a split and a merge store."""
    for widths in accesses(report, "_decode", "part"):
        assert max(widths.values()) >= 2 * 8


@pytest.mark.parametrize(
    ("op", "most"),
    [
        # E of one half; E of the other. The tile's row was read two turns ahead, the rank and the address one.
        ("expand_swiglu (graph)", 2),
        ("expand_qkv_rope_kv (graph)", 2),
        ("expand_residual (graph)", 1),
    ],
)
def test_reads_of_a_tile_overlap(report: list[dict[str, object]], op: str, most: int) -> None:
    """They were 7, 12 and 10 where each was asked for when the one before had come."""
    waits = [entry["latencies"] for entry in report if entry["op"] == op]
    assert waits and waits[0] == most


@pytest.mark.parametrize(
    "op", ["expand_swiglu (graph)", "expand_qkv_rope_kv (graph)", "expand_residual (graph)", "attention (decode)"]
)
def test_programs_that_take_turns_are_all_resident(report: list[dict[str, object]], op: str) -> None:
    """At 64 rows: most of the device is used, and none starts when the others end. They were 1.18 to 1.6 waves."""
    waves = [entry["waves"] for entry in report if entry["op"] == op and entry["kernel"] != "_norm"]
    assert waves
    for value in waves:
        assert isinstance(value, float) and 0.8 < value <= 1


@pytest.mark.parametrize(
    ("op", "most"),
    [
        ("expand_swiglu (graph)", 72),
        ("expand_residual (graph)", 64),
        ("expand_qkv_rope_kv (graph)", 96),
        ("shrink_core (graph)", 72),
        ("attention (decode)", 208),
    ],
)
def test_registers_leave_room_for_programs(report: list[dict[str, object]], op: str, most: int) -> None:
    """Eight programs of 128 threads on an SM at 64 registers, seven at 72, five at 96, two at 208."""
    found = [entry["registers"] for entry in report if entry["op"] == op]
    assert found
    for registers in found:
        assert isinstance(registers, int) and registers <= most


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ("add.s32 %r4, %r3, 1;", 0),
        ("st.shared.b32 [ %r9 + 0 ], %r3;", 1),
        ("@%p1 ld.global.b64 { %rd2 }, [ %r3 + 0 ];\n    st.global.b64 [ %rd9 + 0 ], { %rd2 };", 2),
    ],
)
def test_what_waits_for_what_is_counted(between: str, expected: int) -> None:
    """Two reads at once are one latency; an address that was read, or a use that nothing may pass, another."""
    loop = f"""
$L__BB0_1:
    ld.global.b32 {{ %r1 }}, [ %rd1 + 0 ];
    ld.global.b32 {{ %r2 }}, [ %rd1 + 4 ];
    add.s32 %r3, %r1, %r2;
    {between}
    bra.uni $L__BB0_1;
"""
    assert ptx.latencies(loop) == expected
    assert ptx.latencies(loop.replace("bra.uni", "ret; //")) is None


def accesses(report: list[dict[str, object]], kernel: str, pointer: str) -> list[dict[str, int]]:
    """How often a kernel reads at a pointer, by width in bytes, in each compiled shape that reads there."""
    found = [entry["accesses"] for entry in report if entry["kernel"] == kernel]
    widths = [by_pointer[pointer] for by_pointer in found if isinstance(by_pointer, dict) and pointer in by_pointer]
    assert widths, f"{kernel} no longer has a pointer named {pointer}"
    return widths
