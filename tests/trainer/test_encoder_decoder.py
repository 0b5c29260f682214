"""TuckA in models with an encoder: what `generate` makes is what whole forwards make."""

import pytest
import torch
from peft import get_peft_model
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from tucka_runtime.trainer import TuckAConfig, centroids, routers, set_route_scope

IDS = torch.tensor([[3, 4, 5, 6, 7, 1], [0, 0, 8, 9, 10, 1]])
MASK = (IDS != 0).long()
NEW = 6


def t5():
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))


def bart():
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    return BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=32, forced_eos_token_id=None, **sizes))


def adapted(make, scope):
    torch.manual_seed(0)
    targets = ["q", "v"] if make is t5 else ["q_proj", "v_proj"]
    model = get_peft_model(make(), TuckAConfig(r=4, k=2, t=2, p=2, alpha=16, target_modules=targets)).eval()
    with torch.no_grad():
        for parameter in model.base_model.model.parameters():
            if parameter.ndim == 2:  # else every answer is one token over and over
                parameter.normal_(0, 0.3)
        model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS)  # sets the centroids
        centroids(model, "default").normal_()
        for name, parameter in model.named_parameters():
            if "tucka_g" in name:
                parameter.copy_(torch.randn_like(parameter))
    set_route_scope(model, scope)
    return model


def whole(model, ids, mask):
    """Greedy answers, every token by a forward of the whole model."""
    made = torch.full((len(ids), 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=made).logits[:, -1]
            made = torch.cat([made, logits.argmax(-1, keepdim=True)], 1)
    return made.tolist()


def generated(model, ids, mask, **fields):
    fields = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | fields
    return model.generate(input_ids=ids, attention_mask=mask, **fields).tolist()


@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize("scope", ["batch", "request", "prefix"])
def test_generated_are_the_tokens_of_whole_forwards(make, scope):
    model = adapted(make, scope)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    want = whole(model, IDS, MASK)
    other = whole(model, IDS.flip(1).clamp_min(2), torch.ones_like(MASK))
    assert want != other
    routers(model)["default"].reset_statistics()
    assert generated(model, IDS, MASK, min_new_tokens=None) == want, "the route is of this prompt, without its padding"
    assert sum(routers(model)["default"].statistics()["counts"]) == (1 if scope == "batch" else 2), "and made once"


@pytest.mark.parametrize("make", [t5, bart])
def test_beams_have_their_own_rows_route(make):
    model = adapted(make, "request")
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS)
    first, second = routers(model)["default"].route.weights
    assert not torch.allclose(first, second, atol=0.01)
    together = generated(model, IDS, MASK, num_beams=3)
    alone = [generated(model, row[None], mask[None], num_beams=3)[0] for row, mask in zip(IDS, MASK, strict=True)]
    assert together == alone


def test_labels_are_no_part_of_the_prompt():
    """They are the decoder's, also where they happen to be as long as the encoder's input."""
    model = adapted(t5, "request")
    labels = torch.where(MASK == 1, IDS, -100)
    with torch.no_grad():
        learnt = model(input_ids=IDS, attention_mask=MASK, labels=labels).logits
        read = model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=model.base_model.model._shift_right(labels))
    assert torch.equal(learnt, read.logits)


def test_a_forward_that_fails_leaves_nothing_behind():
    model = adapted(t5, "batch")
    want = generated(model, IDS, MASK)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(input_ids=IDS, attention_mask=MASK)
    assert generated(model, IDS, MASK) == want


def test_what_another_batch_was_encoded_to_has_no_route():
    model = adapted(t5, "request")
    with torch.no_grad():
        encoded = model.get_encoder()(input_ids=IDS[[0, 0, 1]])
        model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS)  # two rows since then
        with pytest.raises(RuntimeError, match="before adapter 'default' was routed"):
            model(encoder_outputs=encoded, decoder_input_ids=IDS[[0, 0, 1]])
