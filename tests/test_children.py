"""Children of ours: how they are started, and that they end with their parent."""

import ast
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.processes import check_ends_with_parent
from tucka_runtime.children import python

FOLDERS = ("tucka_runtime", "server", "loadtest", "kernels")
CHILD = "import sys, time; from tucka_runtime.children import end_with_parent; end_with_parent(int(sys.argv[1]))"
PARENT = """
import os, subprocess, sys, time
code = sys.argv[1] + "; print('there', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code, str(os.getpid())], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


def test_row_47_the_working_directory_is_not_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("random.py", "tucka_runtime/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('executed')\n")
    monkeypatch.chdir(tmp_path)
    for arguments in (("-c", "import random, tucka_runtime.errors"), ("-m", "tucka_runtime.errors")):
        assert subprocess.run(python(*arguments), check=False).returncode == 0


def test_every_child_is_started_by_the_one_helper() -> None:
    """Kernels know nothing of ours; their bench runs the tests of a checkout, and their build loads what it made, with
    -P as well, or -I, which is more."""
    naming = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if any(
            isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.executable"
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
        )
    }
    assert naming == {"tucka_runtime/children.py", "kernels/bench/check.py", "kernels/native/build.py"}
    assert '"-P"' in (ROOT / "kernels" / "bench" / "check.py").read_text("utf-8")
    assert 'sys.executable, "-I"' in (ROOT / "kernels" / "native" / "build.py").read_text("utf-8")


@pytest.mark.parametrize("stopped", [False, True])
def test_a_child_ends_with_its_parent(stopped: bool) -> None:
    """Also a stopped one, which reads nothing and handles no signal."""
    check_ends_with_parent(python("-c", PARENT, CHILD), stopped)


def test_a_child_whose_parent_is_gone_already_ends_at_once() -> None:
    assert subprocess.run(python("-c", CHILD, "1"), check=False).returncode == 1
