"""`--objective classify`: labelled texts in, an adapter and its head out, with which plain peft says the same."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from tests.support.training import make_workplace, train
from tucka_runtime.tokenizer import Tokenizer
from tucka_runtime.trainer import set_route_scope
from tucka_runtime.trainer.base_model import load_tokenizer
from tucka_runtime.trainer.classification import f1
from tucka_runtime.trainer.experiments.base import build_tokenizer
from tucka_runtime.trainer.labelled import Labelled, encode_labelled, labels_of

LABELS = ("billing", "account", "other")


def records() -> list[dict[str, Any]]:
    """The label is a word of the text; texts differ in length."""
    return [{"text": f"{'x' * (i % 5)} {LABELS[i % 3]} {i}", "label": LABELS[i % 3]} for i in range(60)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With bases of three kinds: a decoder, BERT whose pooler is there, and DeBERTa that has none before its head."""
    folder = make_workplace(tmp_path_factory.mktemp("classify"))
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records()))
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 300,
    }  # fmt: skip
    torch.manual_seed(0)
    for name, model in {
        "bert": BertModel(BertConfig(**sizes)), "deberta": DebertaV2Model(DebertaV2Config(**sizes)),
    }.items():  # fmt: skip
        model.save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name / file).write_bytes((folder / "base" / file).read_bytes())
    return folder


@pytest.mark.parametrize(
    ("base", "method", "head"),
    [
        ("base", "tucka", {"score"}),
        ("base", "lora", {"score"}),
        ("bert", "tucka", {"classifier"}),
        ("deberta", "lora", {"classifier", "pooler"}),
    ],
)
def test_plain_peft_gives_the_labels_that_were_measured(
    workplace: Path, tmp_path: Path, base: str, method: str, head: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ("--model", str(workplace / base), "--method", method, "--out", str(out), "--route-batch", "per-sample")
    steps = ("--steps", "40", "--lr", "1e-2", "--eval-fraction", "0.3", "--eval-every", "10")
    assert train(workplace, "--objective", "classify", *flags, *steps) == 0
    said, training = capsys.readouterr().out, json.loads((out / "training.json").read_text())
    held = training["eval"]
    assert "42 texts to train on, 18 held out" in said and training["loop"]["labels"] == sorted(LABELS)
    assert (
        f"accuracy {held['accuracy']:.3f}, f1 {held['f1']:.3f}" in said and held["accuracy"] > 0.5
    )  # a guess is right in 1 of 3
    config = json.loads((out / "adapter_config.json").read_text())
    weights = load_file(out / "adapter_model.safetensors")
    whole = {name.split(".")[2] for name in weights if "lora_" not in name and "tucka_" not in name}
    assert config["task_type"] == "SEQ_CLS" and whole == head <= set(config["modules_to_save"])

    torch.manual_seed(9)  # another head is drawn, and replaced
    fresh = AutoModelForSequenceClassification.from_pretrained(workplace / base, num_labels=3)
    model: Any = peft.PeftModel.from_pretrained(fresh, str(out)).eval()
    if method == "tucka":
        set_route_scope(model, training["route"])
    tokenizer = Tokenizer.load(workplace / base)
    assert tokenizer is not None
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert sum(row["right"] for row in rows) / len(rows) == pytest.approx(held["accuracy"], abs=1e-4)
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([tokenizer.encode(row["prompt"], False)])
            assert training["loop"]["labels"][int(model(input_ids=ids).logits.argmax())] == row["said"]
    card = (out / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "num_labels=3" in card


def test_a_stopped_run_goes_on_bit_for_bit(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tucka_runtime.trainer.loop import Loop

    flags = ("--objective", "classify", "--steps", "4", "--checkpoint-every", "2", "--out", str(tmp_path / "out"))
    assert train(workplace, *flags) == 0
    whole = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    end = Loop.end

    def ending(loop: Loop, work: Any) -> None:
        end(loop, work)
        loop.stopping = loop.step == 2

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "end", ending)
        assert train(workplace, *flags, "--overwrite") == 130
    assert train(workplace, *flags, "--resume") == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == whole


def test_f1_is_the_mean_over_labels() -> None:
    """a: 2·1/(2 + 1), b: 2·1/(1 + 2), c: never said."""
    assert f1("aabc", "abba") == pytest.approx((2 / 4 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "t"}, "'label' must be a non-empty string or an integer"),
        ({"text": "t", "label": True}, "'label' must be"),
        ({"label": "l"}, "'text' must be a non-empty string"),
        ({"text": "x" * 99, "label": 1}, "99 tokens are more than the limit of 9"),
        ([], "must be a JSON object"),
    ],
)
def test_bad_records_have_their_reason(record: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        encode_labelled(record, Tokenizer(build_tokenizer()), 9)


def test_a_text_has_the_tokens_that_the_card_s_lines_give_it(tmp_path: Path) -> None:
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "hello", "world", "##s"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    ((text,), _) = encode_labelled({"text": "hello worlds", "label": "a"}, load_tokenizer(tmp_path, True), 99)
    assert list(text.ids) == AutoTokenizer.from_pretrained(tmp_path)("hello worlds").input_ids == [2, 4, 5, 6, 3]


def test_numbers_are_labels_in_their_order() -> None:
    found = [encode_labelled({"text": "t", "label": n, "score": 0}, Tokenizer(build_tokenizer()), 9) for n in (10, 9)]
    assert [unused for _, unused in found] == [{"score"}] * 2
    assert labels_of(text for texts, _ in found for text in texts) == ("9", "10")
    assert labels_of(Labelled((1,), label, "all") for label in ("1", "01", "0")) == ("0", "01", "1")


def test_a_base_that_tells_other_labels_apart_is_refused(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoModelForSequenceClassification.from_pretrained(workplace / "bert", num_labels=2).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((workplace / "bert" / file).read_bytes())
    flags = ("--objective", "classify", "--steps", "1", "--out", str(tmp_path / "out"))
    assert train(workplace, *flags, "--model", str(tmp_path)) == 2
    assert "a classifier of 2 labels already, and the texts have 3" in capsys.readouterr().err


def test_robertas_positions_begin_behind_padding_s(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RobertaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((workplace / "bert" / file).read_bytes())
    flags = ("--objective", "classify", "--steps", "1", "--model", str(tmp_path), "--out", str(tmp_path / "out"))
    for length, status in ((32, 0), (33, 2)):
        lines = [{"text": label * length, "label": label} for label in "ab" for _ in range(2)]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        data = ("--data", str(tmp_path / "data.jsonl"), "--eval-fraction", "0")
        assert train(workplace, *flags, *data, "--overwrite") == status
    assert "33 tokens are more than the limit of 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--packing",), "packing is for completions"),
        (("--publish", "127.0.0.1:9"), "serves no classifiers"),
        (("--sweep", "lr=1e-3,1e-2"), "Run tucka train once for each"),
        (("--eval-data", "other.jsonl"), "No text to train on is labelled 'unheard'"),
    ],
)
def test_what_does_not_go_together_is_said(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.jsonl").write_text('{"text": "t", "label": "unheard"}\n')
    assert train(workplace, "--objective", "classify", "--out", str(tmp_path / "out"), *flags) == 2
    assert words in capsys.readouterr().err
