"""Rows that hold several records: what is computed is what each record alone would have."""

from itertools import pairwise

import pytest
import torch

from tests.support.training import make_workplace, small_base, train
from tucka_runtime.tokenizer import Tokenizer
from tucka_runtime.trainer import base_model
from tucka_runtime.trainer.adapter import AdapterSettings, attach, router_of
from tucka_runtime.trainer.answers import answered, completion_loss
from tucka_runtime.trainer.data import collate, encode, epoch, pack
from tucka_runtime.trainer.experiments.base import build_tokenizer
from tucka_runtime.trainer.loop import Loop, LoopConfig
from tucka_runtime.trainer.model import set_route_scope

TOKENIZER = Tokenizer(build_tokenizer())


def examples(n=12):
    """Of 3 to 30 tokens."""
    return [
        encode({"prompt": f"number {i} " * (i % 3) + "a:", "completion": "ab" * (i % 4 + 1)}, TOKENIZER, 64)
        for i in range(n)
    ]


def test_no_record_is_cut_and_no_row_is_longer_than_the_longest():
    batch = examples()
    ids, positions, labels = pack(batch, 0)
    assert ids.shape[1] == max(len(e.ids) for e in batch) and ids.shape[0] < len(batch)
    found = []
    for row, at, own in zip(ids, positions, labels, strict=True):
        starts = [*(at == 0).nonzero().flatten().tolist(), len(at)]
        for first, last in pairwise(starts):
            if (own[first:last] != -100).any():
                found.append((tuple(row[first:last].tolist()), int((own[first:last] == -100).sum())))
    assert sorted(found) == sorted((e.ids, e.start) for e in batch)


@pytest.mark.parametrize("scope", ["request", "prefix", "decode", "batch", None])
def test_packed_records_have_the_loss_route_and_gradients_of_padded_ones(scope):
    settings = AdapterSettings(method="tucka" if scope else "lora", r=4, alpha=64, centroids="kaiming")
    found = []
    for packed in (False, True):
        model = attach(small_base(), settings, 0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
        if scope:
            set_route_scope(model, scope, prefix_tokens=5)
        ids, second, labels = (pack if packed else collate)(examples(), 0)
        told = {"position_ids" if packed else "attention_mask": second}
        logits = answered(model, {"input_ids": ids, "labels": labels, **told})
        loss = completion_loss(logits, labels)[0]
        loss.backward()
        router = router_of(model)
        found.append((loss.detach(), router and router.counts, [p.grad for p in model.parameters() if p.requires_grad]))
    (loss, counts, grads), (packed_loss, packed_counts, packed_grads) = found
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
    if scope:
        assert counts.tolist() == packed_counts.tolist()
    for mine, own in zip(packed_grads, grads, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changed", [{"packing": True}, {"gradient_checkpointing": True}])
def test_a_training_is_the_same_but_for_its_speed(changed):
    losses = []
    for more in ({}, changed):
        base = small_base()
        config = LoopConfig(steps=6, batch_size=6, lr=1e-2, route_batch="mixed", **more)
        base_model.prepare(base, config.packing, config.gradient_checkpointing)
        model = attach(base, AdapterSettings(r=4, alpha=64), 0)
        loop = Loop(model, examples(24), [], config, pad=0, device=torch.device("cpu"), router=router_of(model))
        losses.append(loop.run().loss)
        on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert on == config.gradient_checkpointing
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_records_of_similar_length_go_together():
    found = {by_length: epoch(examples(60), 6, 0, 0, False, by_length) for by_length in (False, True)}
    padded = {name: sum(len(b) * max(len(e.ids) for e in b) for b in batches) for name, batches in found.items()}
    assert padded[True] < 0.7 * padded[False]
    assert sorted(e.ids for b in found[True] for e in b) == sorted(e.ids for b in found[False] for e in b)


def test_a_model_that_mixes_records_is_refused(tmp_path, monkeypatch, capsys):
    folder = make_workplace(tmp_path)
    load = base_model.load_model

    def mixing(*arguments):
        """A model that does not see positions, as those do not that keep a state instead of attending."""
        model = load(*arguments)
        forward = model.forward
        model.forward = lambda position_ids=None, **rest: forward(**rest)
        return model

    assert train(folder, "--steps", "1", "--packing", "--group-by-length", "--gradient-checkpointing") == 0
    monkeypatch.setattr(base_model, "load_model", mixing)
    assert train(folder, "--steps", "1", "--packing", "--overwrite") == 2
    assert "does not keep records apart" in capsys.readouterr().err
