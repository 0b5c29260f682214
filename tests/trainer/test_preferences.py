"""DPO: pairs as people have them, eq. 7 and its gradients against fp64, and that the held-out margin rises."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.training import make_workplace, small_base, train
from tucka_runtime.tokenizer import Tokenizer
from tucka_runtime.trainer.adapter import AdapterSettings, attach, router_of
from tucka_runtime.trainer.data import DataError, encode
from tucka_runtime.trainer.experiments.base import build_tokenizer
from tucka_runtime.trainer.jobs import Job, Together
from tucka_runtime.trainer.loop import Loop, LoopConfig
from tucka_runtime.trainer.pairs import Pair, encode_pair, load
from tucka_runtime.trainer.records import read
from tucka_runtime.trainer.shared import clone

TOKENIZER = Tokenizer(build_tokenizer())
CPU = torch.device("cpu")
BETA = 0.3


def records(n: int = 24) -> list[dict[str, str]]:
    """Numbers are wished for behind `number`, letters behind `letter`; answers differ in length."""
    answers = ("1", "aa")
    return [
        {
            "prompt": f"{'number' if i % 2 else 'letter'} {i}:", "chosen": answers[1 - i % 2],
            "rejected": answers[i % 2], "task": "ab"[i % 2],
        }
        for i in range(n)
    ]  # fmt: skip


def pairs(n: int = 24) -> list[Pair]:
    return [encode_pair(record, TOKENIZER, 64)[0][0] for record in records(n)]


def make(method: str, route: str = "per-sample", base: Any = None, **more: Any) -> Loop:
    settings = AdapterSettings(method=method, r=4, alpha=64, centroids="kaiming")
    model = attach(base or small_base(), settings, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # at zero the adapter would change nothing
                p.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
    config = LoopConfig(
        **{"steps": 3, "batch_size": 5, "lr": 1e-3, "route_batch": route, "objective": "dpo", "beta": BETA} | more
    )
    return Loop(model, pairs()[4:], pairs()[:4], config, pad=0, device=CPU, router=router_of(model))


def said(model: Any, answer: Any) -> Any:
    """log p of an answer's tokens after its prompt, in the model's own precision, alone and without padding."""
    ids = torch.tensor([answer.ids])
    labels = torch.where(torch.arange(len(answer.ids)) < answer.start, -100, ids[0])[None]
    logp = model(input_ids=ids, labels=labels, use_cache=False).logits[0].log_softmax(-1)
    return sum(logp[i - 1, answer.ids[i]] for i in range(answer.start, len(answer.ids)))


@pytest.mark.parametrize("method", ["tucka", "lora"])
def test_loss_and_gradients_are_those_of_eq_7_in_fp64(method: str) -> None:
    loop = make(method, accumulate=2, gradient_checkpointing=method == "tucka")
    reference, policy = small_base().double(), copy.deepcopy(loop.model).double()
    taken = [pair for i in range(2) for pair in loop._micro_batch(i)]
    if router := router_of(policy):
        router.scope = "request"
    losses = []
    for pair in taken:
        chosen, rejected = (said(policy, a) - said(reference, a).detach() for a in (pair.chosen, pair.rejected))
        losses.append(-torch.log(1 / (1 + torch.exp(-BETA * (chosen - rejected)))))
    wanted = sum(losses) / len(losses)
    wanted.backward()
    work = loop.begin()
    loop.model.train()
    for batch in work.batches:
        loop.learn(work, loop.objective.logits(loop.model, batch), batch).backward()
    assert work.loss == pytest.approx(wanted.item(), rel=1e-5) and abs(work.loss - math.log(2)) > 1e-3
    own = [p.grad for p in policy.parameters() if p.requires_grad]
    largest = max(grad.abs().max().item() for grad in own)
    for (name, p), grad in zip(loop.parameters, own, strict=True):
        assert p.grad is not None and p.requires_grad, name
        torch.testing.assert_close(p.grad.double(), grad, rtol=1e-3, atol=1e-5 * largest)


def test_what_is_held_out_is_measured_as_eq_7_says() -> None:
    loop = make("lora")
    base = small_base()
    with torch.no_grad():
        gained = [[(said(loop.model, a) - said(base, a)).item() for a in (p.chosen, p.rejected)] for p in loop.held]
    result = loop.evaluate().figures
    margins = [BETA * (chosen - rejected) for chosen, rejected in gained]
    assert result["margin"] == pytest.approx(sum(margins) / 4, rel=1e-3)
    assert result["accuracy"] == sum(margin > 0 for margin in margins) / 4
    assert result["reward_chosen"] == pytest.approx(BETA * sum(chosen for chosen, _ in gained) / 4, rel=1e-3)
    assert loop.model.training and all(p.requires_grad for _, p in loop.parameters)


@pytest.mark.parametrize("route", ["per-sample", "mixed"])
def test_pairs_among_jobs_are_learnt_as_alone(route: str) -> None:
    alone = [make(method, route) for method in ("tucka", "lora")]
    for loop in alone:
        loop.run()
    base = small_base()
    jobs = [Job(method, make(method, route, base=clone(base))) for method in ("tucka", "lora")]
    Together(base, jobs, lambda job: None).run()
    for loop, job in zip(alone, jobs, strict=True):
        assert not job.failed and job.loop.history.loss == pytest.approx(loop.history.loss, rel=1e-5)
        for (name, p), (_, q) in zip(loop.parameters, job.loop.parameters, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    folder = make_workplace(tmp_path)
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records()))
    return folder


@pytest.mark.parametrize("method", ["tucka", "lora"])
def test_a_short_run_raises_the_held_out_margin(
    workplace: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--objective", "dpo", "--method", method, "--eval-fraction", "0.25", "--lr", "5e-3", "--eval-every", "3")
    assert train(workplace, "--steps", "12", *more, "--beta", "0.5") == 0
    training = json.loads((workplace / "out" / "training.json").read_text())
    held = training["eval"]
    assert (training["flags"]["objective"], training["flags"]["beta"], training["data"]["held_out"]) == ("dpo", 0.5, 6)
    assert held["margin"] > 0.3 and held["accuracy"] == 1.0 and held["loss"] < 0.6 and "base" not in held
    assert held["margin"] == pytest.approx(held["reward_chosen"] - held["reward_rejected"], abs=2e-4)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "held out: loss" in line]
    assert len(lines) == 4 and all(" accuracy " in line and " margin " in line for line in lines)
    margins = [float(line.split(" margin ")[1].split()[0]) for line in lines]
    assert margins[-1] > margins[0]
    assert "18 pairs to train on, 6 held out" in out and "accuracy 1.000, margin" in out
    assert "DPO with beta = 0.5" in (workplace / "out" / "README.md").read_text()
    rows = [json.loads(line) for line in (workplace / "out" / "predictions.jsonl").read_text().splitlines()]
    assert {row["expected"] for row in rows} == {"1", "aa"}


def test_a_stopped_training_goes_on_bit_for_bit(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--objective", "dpo", "--steps", "4", "--checkpoint-every", "2")
    assert train(workplace, *flags) == 0
    whole = (workplace / "out" / "adapter_model.safetensors").read_bytes()
    end = Loop.end

    def ending(loop: Loop, work: Any) -> None:
        end(loop, work)
        loop.stopping = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "end", ending)
        assert train(workplace, *flags, "--overwrite") == 130
    assert "stopped after step 1 of 4" in capsys.readouterr().out
    assert train(workplace, *flags, "--resume") == 0
    assert (workplace / "out" / "adapter_model.safetensors").read_bytes() == whole


def test_a_sweep_over_pairs_is_by_accuracy(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(workplace, "--objective", "dpo", "--steps", "1", "--sweep", "beta=0.1,0.5") == 0
    said = capsys.readouterr().out
    assert "best by held-out accuracy, then loss: beta-0." in said
    head = next(line for line in said.splitlines() if line.startswith("job "))
    assert head.split() == ["job", "steps", "loss", "held-out", "loss", "accuracy", "margin"]


USER, SYSTEM = {"role": "user", "content": "q"}, {"role": "system", "content": "s"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("yes", "no"))


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        {"prompt": "q", "messages": [USER, GOOD], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
    ],
)
def test_conversations_are_those_of_sft(record: dict[str, Any]) -> None:
    """TRL's explicit and implicit prompts, and UltraFeedback's columns."""
    ((pair,), ignored) = encode_pair(record, TOKENIZER, 64)
    assert pair == Pair(*(encode({"messages": [SYSTEM, USER, said]}, TOKENIZER, 64) for said in (GOOD, BAD)))
    assert not ignored


def test_texts_are_those_of_sft(tmp_path: Path) -> None:
    record = {"prompt": "q ", "chosen": "yes", "rejected": " no", "score": 1}
    (tmp_path / "d").write_text(json.dumps(record))
    told: list[str] = []
    (pair,) = load(read(tmp_path / "d"), TOKENIZER, 64, tell=told.append)
    assert pair == Pair(*(encode({"prompt": "q ", "completion": said}, TOKENIZER, 64) for said in ("yes", " no")))
    assert told == ["d: ignored keys: score"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "q", "chosen": "a"}, "two non-empty strings"),
        ({"chosen": "a", "rejected": "b"}, "'prompt' must be a non-empty string"),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, "'prompt' must be a list of messages"),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, BAD]}, "the same but for the last message"),
        ({"chosen": [USER, GOOD, USER], "rejected": [USER, GOOD, SYSTEM]}, "must be the assistant's"),
        ({"prompt": "q", "completion": "c"}, "two non-empty strings"),
    ],
)
def test_bad_pairs_name_line_and_reason(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    (tmp_path / "d").write_text(json.dumps(record))
    with pytest.raises(DataError, match=f"line 1: .*{reason}"):
        load(read(tmp_path / "d"), TOKENIZER, 64)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "line 1: it is a preference pair"),
        (("--objective", "dpo", "--packing"), "answers of pairs, and labelled texts, have a row each"),
        (("--objective", "dpo", "--beta", "0"), "beta must be above 0"),
        (("--objective", "dpo", "--learn", "generation"), "the last turn alone"),
        (("--beta", "0.2"), "beta is DPO's"),
    ],
)
def test_what_does_not_go_together_is_said(
    workplace: Path, flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(workplace, *flags) == 2
    assert words in capsys.readouterr().err
