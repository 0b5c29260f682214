"""The scripts of docs/measurements/first-run, as far as a machine without a device can run them: they must not rot
until one has a device for ten minutes."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tucka_runtime.kernels.bench.__main__ import SWEPT, parse

pytestmark = pytest.mark.interpreted
FOLDER = ROOT / "docs" / "measurements" / "first-run"


def sections(script: str, folder: Path, *only: str) -> dict[str, dict[str, object]]:
    """What a script finds in its sections, of which it runs those that are asked for."""
    command = [sys.executable, str(FOLDER / script), "--small", "--out", str(folder), "--only", *only]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, dict[str, object]] = json.loads((folder / script.replace(".py", ".json")).read_text())["sections"]
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[-len(found) :]] == list(found), "the table"
    return found


def module(name: str) -> Any:
    """A script as a module."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


def test_every_script_starts_and_has_the_sections_that_the_page_names(tmp_path: Path) -> None:
    """Its cheapest sections run, and the one that fills memory; what decides a constant, says the page, is there."""
    found = {
        "right.py": sections("right.py", tmp_path, "memcheck"),
        "where.py": sections("where.py", tmp_path, "machine", "counters", f"sweep {SWEPT[0]}"),
        "engine.py": sections("engine.py", tmp_path, "start", "graphs", "full"),
    }
    ran = {script: [name for name, own in each.items() if "seconds" in own] for script, each in found.items()}
    assert ran["right.py"] == ["memcheck"] and len(ran["engine.py"]) == 3 and len(ran["where.py"]) == 3
    measured = found["where.py"]["machine"]
    assert {"copy TB/s", "launch us", "wait us", "fork and join us"} <= set(measured)
    full = found["engine.py"]["full"]
    assert full["loaded"] and "MB of the memory that" in str(full["refused"])
    page = (ROOT / "docs" / "measurements" / "README.md").read_text()
    named = re.findall(r"((?:`[a-z]+`(?:, | and )?)+)(?: of the op in| of| in) `first-run/([a-z]+\.py)`", page)
    assert len(named) > 3
    for names, script in named:
        for name in re.findall(r"`([a-z]+)`", names):
            assert any(own.split(" ")[0] == name for own in found[script]), (name, script)


def test_every_unmeasured_constant_has_a_line_that_decides_it() -> None:
    """The page names the file of each, and what it names of a file is there."""
    page = (ROOT / "docs" / "measurements" / "README.md").read_text()
    table = page[page.index("| unmeasured |") :].split("\n\n")[0]
    folders = ("kernels/fused", "kernels/tables", "tucka_runtime/engine")
    files = {path.stem: path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    unmeasured = [name for name, path in files.items() if "nmeasured" in path.read_text()]
    assert len(unmeasured) > 5
    assert not [name for name in unmeasured if not re.search(rf"`{name}[`.]", table)]
    named = re.findall(r"`(\w+)\.([A-Za-z_]+)`", table)
    assert len(named) > 4
    for name, constant in named:
        assert re.search(rf"^(def )?{constant}\b", files[name].read_text(), re.MULTILINE), (name, constant)


def test_what_the_scripts_ask_of_others_is_there() -> None:
    """The kernels' bench takes their arguments, the test that compute-sanitizer is to watch exists, and what has no
    hypothesis runs all tests of a device but one."""
    where, right = module("where"), module("right")
    assert parse(where.COUNTED).op and all(parse([*where.SWEEP, op]).op == [op] for op in SWEPT)
    *own, _, mark = right.SANITIZED
    status, text = right.pytest(*own, "--collect-only")  # those of a GPU are deselected where there is none
    assert status == 0 and mark == "gpu" and "test_graphs.py: 1" in text
    needing = {path.name for path in (ROOT / "tests/kernels").glob("*.py") if right.needs_hypothesis(path)}
    assert needing == {"test_properties.py", "test_reference_delta.py", "test_reference_route.py"}


def test_reads_of_what_nobody_wrote_are_errors_but_where_anything_may_lie() -> None:
    right = module("right")
    lines = (ROOT / "kernels" / "fused" / "tiles.py").read_text().splitlines()
    of_h, of_e = (1 + next(i for i, text in enumerate(lines) if f"tl.load({at}" in text) for at in ("h_at", "e_at"))
    report = f"=========     at _qkv+0x11f0 in tiles.py:{of_h}\n=========     at _add in tiles.py:{of_e}\n"
    assert [(name.split(":")[0], count) for name, count in right.uninitialised(report).items()] == [("_add", 1)]


def test_a_section_that_fails_or_comes_too_late_is_a_line_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = module("report")
    monkeypatch.setattr(sys, "argv", ["x", "--small", "--seconds", "1000", "--out", str(tmp_path)])
    own = report.Report("x", None)
    own.section("broken", lambda: {"a": 1 / 0})
    own.args.seconds = -1
    own.section("late", dict)
    assert own.end() == 1
    assert "failed ZeroDivisionError" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["sections"]["late"]["failed"] == "no time was left"
