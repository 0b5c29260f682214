"""Logits of learnt tokens alone, and LoRA's second matrix: what they are is what the whole forward has."""

import peft
import pytest
import torch
from torch import nn

from tests.support.training import small_base
from tucka_runtime.trainer.adapter import AdapterSettings, attach
from tucka_runtime.trainer.answers import answer_logps, answered, completion_loss, exact
from tucka_runtime.trainer.up_projection import UpProjection

# Two records, the second one padded; the first token can be asked of nobody.
IDS = torch.tensor([[5, 6, 7, 8, 9], [7, 5, 9, 0, 0]])
LABELS = torch.tensor([[-100, -100, 7, 8, 9], [-100, 5, -100, -100, -100]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "labels": LABELS}


def adapted(targets: tuple[str, ...]) -> peft.PeftModel:
    settings = AdapterSettings(method="tucka", r=4, alpha=64, centroids="kaiming", target_modules=targets)
    return attach(small_base(), settings, 0).eval()


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "lm_head")])
def test_logits_of_learnt_tokens_are_those_of_the_whole_forward(targets: tuple[str, ...]) -> None:
    model = adapted(targets)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1]))
    with torch.no_grad():
        whole = model(**BATCH, use_cache=False)
        own = answered(model, BATCH)
    assert own.shape == (4, whole.logits.shape[-1])
    torch.testing.assert_close(own, whole.logits[[0, 0, 0, 1], [1, 2, 3, 0]])
    loss, count = completion_loss(own, LABELS)
    assert count == 4
    torch.testing.assert_close(loss / count, whole.loss)
    torch.testing.assert_close(answer_logps(own, LABELS).sum(), -loss)
    # An adapted head has its routes by rows, and is given them.
    assert seen == [(2, 5), (1, 4) if targets == ("all-linear",) else (2, 5)]


def test_of_the_base_s_own_loss_nothing_is_computed() -> None:
    model = adapted(("all-linear",))
    model.get_base_model().loss_function = lambda **_: pytest.fail("the base computed a loss")
    answered(model, BATCH)


def test_a_row_is_exact_when_all_its_learnt_tokens_are_the_likeliest() -> None:
    logits = nn.functional.one_hot(torch.tensor([7, 8, 9, 5]), 12).float()
    assert exact(logits, LABELS).tolist() == [True, True]
    for wrong, rows in ((1, [False, True]), (3, [True, False])):
        assert exact(logits.index_fill(0, torch.tensor(wrong), 0), LABELS).tolist() == rows


def test_lora_s_second_matrix_gives_the_same_and_keeps_its_name() -> None:
    plain = peft.get_peft_model(small_base(), AdapterSettings(method="lora", r=4, alpha=8).peft_config())
    model = attach(small_base(), AdapterSettings(method="lora", r=4, alpha=8), 0)
    assert any(isinstance(module, UpProjection) for module in model.modules())
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    plain.load_state_dict(model.state_dict())
    grads = []
    for each in (plain, model):
        completion_loss(answered(each, BATCH), LABELS)[0].backward()
        grads.append([p.grad for p in each.parameters() if p.requires_grad])
    for own, wanted in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-6)
