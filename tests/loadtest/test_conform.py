"""The isolation kit: it passes the real server, and every row fails before a proxy with the row's own fault."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support import GOLDEN
from tests.support.faulty_proxy import FAULTS, proxy
from tests.support.servers import Server
from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest.cli import main
from tucka_runtime.loadtest.client import LoadClient
from tucka_runtime.loadtest.conform.made import make, read_linears
from tucka_runtime.loadtest.conform.oracle import FIRST, Findings, Oracle
from tucka_runtime.loadtest.conform.rows import ROWS
from tucka_runtime.loadtest.record import Record, StreamedToken
from tucka_runtime.loadtest.settings import Settings

TINY = GOLDEN / "bases" / "llama-tiny"

# The fault that each row is there for, and the further adapters that it takes.
FAULT_OF = {
    "applied": "ignored",
    "own": "wrong",
    "base": "touched",
    "alternation": "sticky",
    "batch": "batched",
    "unload": "zombie",
    "new-content": "remembered",
    "cancelled": "leftover",
    "slots": "evicted",
    "in-place": "mixed",
    "while-streaming": "dies",
}


@pytest.fixture(scope="module")
def folder(roots: Path) -> Path:
    made = roots / "conform"
    make(TINY, made, 6, tucka=True)
    return made


def hold(url: str, folder: Path, *flags: str, given: int = 0) -> tuple[int, dict[str, Any]]:
    """Exit status and rows by name. `given` adapters are given as folders, else the kit makes them."""
    out = folder / "rows.json"
    adapters = ["--adapter", *sorted(str(p) for p in folder.iterdir() if p.is_dir())[:given]]
    made = ["--base", str(TINY), "--folder", str(folder), "--tucka"]
    status = main(
        [
            "conform",
            url,
            *(adapters if given else made),
            "--tokens",
            "8",
            "--stream-tokens",
            "48",
            "--json",
            str(out),
            *flags,
        ]
    )
    return status, {row["name"]: row for row in json.loads(out.read_text())["rows"]}


def test_the_real_server_passes(live: Server, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = live.get("/v1/models").json()["data"]
    status, rows = hold(live.url, folder, "--slots", "4", "--stream-tokens", "192")
    assert status == 0 and rows.keys() == FAULT_OF.keys()
    for name, row in rows.items():
        assert row["verdict"] == "pass" or (name in ("in-place", "while-streaming") and "was over" in row["reason"]), (
            row
        )
    assert live.get("/v1/models").json()["data"] == before
    assert "pass  own: an adapter's answer is its own" in capsys.readouterr().out


def test_the_password_of_a_url_is_not_written(live: Server, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = hold(live.url.replace("://", "://joe:s3cret@"), folder, "--rows", "own", given=3)
    assert status == 0 and json.loads((folder / "rows.json").read_text())["url"] == live.url
    assert "s3cret" not in capsys.readouterr().out


def test_a_proxy_without_a_fault_changes_nothing(live: Server, folder: Path) -> None:
    with proxy(live.url, None) as url:
        status, rows = hold(url, folder, "--rows", "in-place,while-streaming,cancelled", given=3)
    assert status == 0 and [row["verdict"] for row in rows.values()] == ["pass"] * 3, rows


@pytest.mark.parametrize(("row", "fault"), [*FAULT_OF.items(), ("in-place", "kept"), ("while-streaming", "mixed")])
def test_every_row_sees_its_fault(row: str, fault: str, live: Server, folder: Path) -> None:
    given = {"applied": 0, "slots": 6}.get(row, 3)
    with proxy(live.url, fault) as url:
        status, rows = hold(url, folder, "--rows", row, "--slots", "4", given=given)
    assert status == 1 and rows[row]["verdict"] == "fail", rows
    assert rows[row]["evidence"]


def test_every_row_and_every_fault_is_tried() -> None:
    assert [row.name for row in ROWS] == list(FAULT_OF)
    assert {*FAULT_OF.values(), "kept"} == FAULTS.keys()


def answer(*tokens: str, second: str = "?", margin: float = 9.0, **state: Any) -> Record:
    streamed = [StreamedToken(token, second, margin) for token in tokens]
    return Record("conform", "m", index=FIRST, text="".join(tokens), tokens=streamed, **state)


@pytest.mark.parametrize(
    ("came", "own", "logprobs", "outcome", "verdict"),
    [
        (answer("a", "b"), answer("a", "b"), True, "own", "pass"),
        (answer("x", "y"), answer("a", "b"), True, "other", "fail"),
        (answer("a", "c"), answer("a", "b"), True, "changed", "fail"),
        (answer("a", "c"), answer("a", "b", second="c"), True, "changed", "fail"),  # the best by far
        (answer("a", "c"), answer("a", "b", second="c", margin=0.1), True, "tied", "n/a"),  # alone it shows nothing
        (answer("a", "c"), answer("a", "b"), False, "unsure", "n/a"),
        (answer("a", status=200, cause="truncated"), answer("a", "b"), True, "failed", "fail"),
        (answer(status=503, cause="http_503"), answer("a", "b"), True, "busy", "n/a"),
    ],
)
def test_an_answer_is_judged(came: Record, own: Record, logprobs: bool, outcome: str, verdict: str) -> None:
    oracle = Oracle(LoadClient(Settings()), "base", 8, 8, logprobs=logprobs)
    oracle.references = {"/a": [own] * 3, "/b": [answer("x", "y")] * 3}
    judged = oracle.judge(came, "/a")
    assert (judged.outcome, judged.owner) == (outcome, "/b" if outcome == "other" else None)
    assert Findings([judged]).verdict() == verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_base_of_any_type_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {f"model.layers.{n}.self_attn.{t}_proj.weight": torch.randn(8, 6) * 0.5 for n in (10, 2) for t in "vq"}
    save_file({name: weight.to(dtype) for name, weight in weights.items()}, tmp_path / "model.safetensors")
    linears = read_linears(tmp_path)
    short = [linear.path.removeprefix("model.layers.").replace("self_attn.", "") for linear in linears]
    assert short == ["2.q_proj", "2.v_proj", "10.q_proj", "10.v_proj"]
    for linear in linears:
        expected = float(weights[f"{linear.path}.weight"].std(correction=0))
        assert (linear.d_in, linear.d_out) == (6, 8) and linear.spread == pytest.approx(expected, rel=0.02)


def test_what_cannot_be_held_is_said(
    live: Server, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no")
    for flags, said in (
        ([], "give adapters"),
        (["--base", str(TINY)], "--folder"),
        (["--base", str(tmp_path), "--folder", str(tmp_path)], "no safetensors file"),
        (["--base", str(GOLDEN / "bases" / "gpt2-tiny"), "--folder", str(tmp_path)], "--adapter"),
        (["--adapter", "/a"], "two folders"),
        (["--adapter", "/a", "/b", "--rows", "own,all"], "--rows: no all"),
        (["--adapter", "/nowhere/a", "/nowhere/b"], "a could not be loaded (status 400)"),
    ):
        assert main(["conform", live.url, *flags]) == 1
        assert said in capsys.readouterr().err, flags
    with pytest.raises(ConfigError):
        read_linears(tmp_path / "nowhere")
