"""What a server hands to the processes that it starts."""

import os
from pathlib import Path

import pytest

from tucka_runtime.server.parts import keep_compiled


def test_compiled_kernels_are_kept_below_the_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    keep_compiled(None)
    assert "TRITON_CACHE_DIR" not in os.environ
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    keep_compiled(str(tmp_path))
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    keep_compiled(str(tmp_path))
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
