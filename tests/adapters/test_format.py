"""The official layout: what is read, what is written, what is refused and in which words."""

import io
import json
import math
import os
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load, load_file, save

from tests.support import GOLDEN
from tests.support.adapter_files import (
    PREFIX,
    K,
    P,
    R,
    T,
    join,
    lora_config,
    lora_tensors,
    put,
    split,
    tucka_config,
    tucka_tensors,
)
from tucka_runtime.adapters import format as adapter_format
from tucka_runtime.adapters import targets
from tucka_runtime.adapters.config import parse_config
from tucka_runtime.adapters.config_fields import MAX_CENTROIDS
from tucka_runtime.adapters.files import CONFIG_NAME, TRAINING_NAME, WEIGHTS_NAME, start_digest, strict_json
from tucka_runtime.adapters.format import (
    LoRAModule,
    LoRASpec,
    TuckAModule,
    TuckASpec,
    match_targets,
    read_adapter,
    write_adapter,
)
from tucka_runtime.adapters.safefile import MAX_HEADER_BYTES, read_header, read_tensors
from tucka_runtime.errors import AdapterError, BaseModelMismatchError, InvalidAdapterError, TuckaError
from tucka_runtime.messages import BaseLayout

CASES = sorted(folder.parent.name for folder in GOLDEN.glob("*/adapter"))
ROUTER_LATE = "llama-routername-late-k1"


# --- what is read ---


@pytest.mark.parametrize("case", [case for case in CASES if case != ROUTER_LATE])
def test_golden(golden, golden_layout, case):
    folder = golden / case / "adapter"
    raw = json.loads((folder / CONFIG_NAME).read_text())
    expected = json.loads((golden / case / "expected.json").read_text())
    layout = golden_layout(golden / case / expected["base"])
    adapter = read_adapter(folder, layout)
    stored = load_file(folder / WEIGHTS_NAME)
    assert adapter.kind == "tucka"
    config, weights = (folder / CONFIG_NAME).read_bytes(), (folder / WEIGHTS_NAME).read_bytes()
    digest = start_digest(config, len(weights))
    digest.update(weights)
    assert adapter.digest == digest.hexdigest()
    assert [path for path in layout.linears if path in adapter.modules] == list(adapter.modules)
    read = {f"{adapter.router}.tucka_ec": adapter.ec, **adapter.saved}
    for path, module in adapter.modules.items():
        read |= {f"{path}.tucka_g": module.g, f"{path}.tucka_c": module.c, f"{path}.tucka_u": module.u}
    assert {PREFIX + name for name in read} == stored.keys()
    for name, tensor in read.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, stored[PREFIX + name], rtol=0, atol=0)
    assert config_fields(adapter.config) == {**raw, "target_modules": list(adapter.config.target_modules)}


def config_fields(config: TuckASpec | LoRASpec) -> dict[str, Any]:
    return adapter_format.config_as_dict(config)


def test_golden_router_that_runs_late_is_refused(golden, golden_layout):
    with pytest.raises(InvalidAdapterError, match="router runs after another module"):
        read_adapter(golden / ROUTER_LATE / "adapter", golden_layout(golden / "bases" / "llama-tiny"))


def test_lora_scales_follow_the_patterns(tmp_path, base):
    tensors = lora_tensors(base)
    for name in [name for name in tensors if "layers.1.self_attn" in name]:
        tensors[name] = torch.randn(4, 6) if "lora_A" in name else torch.randn(6, 4)
    patterns = {"rank_pattern": {"^model.layers.1.self_attn.q_proj": 4}, "alpha_pattern": {"mlp.(up|down)_proj": 3}}
    plain = read_adapter(put(tmp_path / "plain", lora_config(**patterns), tensors), base)
    rslora = read_adapter(put(tmp_path / "rs", lora_config(**patterns, use_rslora=True), tensors), base)
    assert plain.kind == "lora" and plain.router is None and plain.ec is None
    scales = {path: module.scale for path, module in plain.modules.items() if isinstance(module, LoRAModule)}
    assert scales == {
        "model.layers.0.self_attn.q_proj": 8 / 2,
        "model.layers.0.mlp.down_proj": 3 / 2,
        "model.layers.1.self_attn.q_proj": 8 / 4,
        "model.layers.1.mlp.down_proj": 3 / 2,
    }
    module = rslora.modules["model.layers.1.self_attn.q_proj"]
    assert isinstance(module, LoRAModule)
    assert module.scale == 8 / 4**0.5
    assert torch.equal(module.a, tensors[f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight"])


def test_lora_as_peft_saves_it(tmp_path, base):
    """Read back, every module's change is the one PEFT adds to its weight."""
    root = torch.nn.Module()
    for path, (d_in, d_out) in base.linears.items():
        *parents, last = path.split(".")
        node = root
        for name in parents:
            if not hasattr(node, name):
                node.add_module(name, torch.nn.Module())
            node = getattr(node, name)
        node.add_module(last, torch.nn.Linear(d_in, d_out, bias=False))
    config = LoraConfig(
        r=R,
        lora_alpha=8,
        use_rslora=True,
        target_modules=r".*(layers\.0.*q_proj|down_proj)",
        rank_pattern={r"layers\.\d\.mlp\..*": 3},
        alpha_pattern={"q_proj": 5},
        init_lora_weights=False,
        task_type="FEATURE_EXTRACTION",
    )
    theirs = get_peft_model(root, config)
    theirs.save_pretrained(tmp_path)
    ours = read_adapter(tmp_path, base)
    assert len(ours.modules) == 3
    for path, module in ours.modules.items():
        assert isinstance(module, LoRAModule)
        delta = theirs.get_submodule(PREFIX + path).get_delta_weight("default")
        torch.testing.assert_close(module.scale * module.b @ module.a, delta)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_fp32(tmp_path, base, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in tucka_tensors(base).items()}
    adapter = read_adapter(put(tmp_path, tucka_config(), tensors), base)
    assert adapter.ec is not None
    assert torch.equal(adapter.ec, tensors[f"{PREFIX}{adapter.router}.tucka_ec"].float())


@pytest.mark.parametrize(
    ("entries", "saved"),
    [
        (["lm_head"], ["lm_head.weight"]),
        (["head"], ["lm_head.weight"]),  # PEFT: any end of the name
        (["norm", "embed_tokens"], ["model.embed_tokens.weight", "model.norm.weight"]),
        (["layers.1.mlp"], [f"model.layers.1.mlp.{name}_proj.weight" for name in ("down", "gate", "up")]),
    ],
)
def test_modules_to_save(tmp_path, base, entries, saved):
    tensors = tucka_tensors(base)
    tensors |= {PREFIX + name: torch.randn(base.parameters[name]) for name in saved}
    adapter = read_adapter(put(tmp_path, tucka_config(modules_to_save=entries), tensors), base)
    assert sorted(adapter.saved) == saved
    assert torch.equal(adapter.saved[saved[0]], tensors[PREFIX + saved[0]])


def test_one_expert_in_several_groups_is_allowed(tmp_path, base):
    tensors = tucka_tensors(base)
    for name, tensor in tensors.items():
        tensors[name] = tensor[:K] if name.endswith("_ec") else tensor[:1] if name.endswith("_c") else tensor
    assert read_adapter(put(tmp_path, tucka_config(t=1), tensors), base).config == parse_config(
        json.dumps(tucka_config(t=1)).encode()
    )


def test_training_json(tmp_path, base):
    put(tmp_path, tucka_config(), tucka_tensors(base))
    assert read_adapter(tmp_path, base).training is None
    notes = {"base_fingerprint": base.fingerprint, "loss": [2.0, 1.5]}
    (tmp_path / TRAINING_NAME).write_text(json.dumps(notes))
    assert read_adapter(tmp_path, base).training == notes
    for useless in ("[]", "{", '{"a": NaN}', '"' + "x" * 2**17 + '"'):
        (tmp_path / TRAINING_NAME).write_text(useless)
        assert read_adapter(tmp_path, base).training is None
    (tmp_path / TRAINING_NAME).write_text('{"base_fingerprint": "another base"}')
    with pytest.raises(BaseModelMismatchError, match="fingerprint"):
        read_adapter(tmp_path, base)


# --- what is written ---


def test_written_adapters_come_back(tmp_path, base):
    config = TuckASpec(r=R, k=K, t=T, p=P, alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    tensors = {**tucka_tensors(base), f"{PREFIX}lm_head.weight": torch.randn(16, 6)}
    digest = write_adapter(tmp_path / "new", config, {n.removeprefix(PREFIX): t for n, t in tensors.items()})
    adapter = read_adapter(tmp_path / "new", base)
    assert adapter.config == config and adapter.digest == digest
    stored = load_file(tmp_path / "new" / WEIGHTS_NAME)
    assert stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name]) for name in tensors)
    assert sorted(os.listdir(tmp_path / "new")) == [CONFIG_NAME, WEIGHTS_NAME]
    with pytest.raises(ValueError, match="without base_model"):
        write_adapter(tmp_path / "twice", config, tensors)


def test_peft_reads_what_is_written(tmp_path, base):
    config = LoRASpec(r=R, lora_alpha=4, target_modules=["q_proj", "down_proj"], use_rslora=True)
    write_adapter(tmp_path, config, {n.removeprefix(PREFIX): t for n, t in lora_tensors(base).items()})
    theirs = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, LoraConfig)
    assert (theirs.r, theirs.lora_alpha, theirs.use_rslora) == (R, 4, True)
    assert theirs.target_modules == {"q_proj", "down_proj"}
    assert len(read_adapter(tmp_path, base).modules) == 4


# --- which modules ---


NAMES = [
    f"model.layers.{i}.{part}" for i in (0, 1, 11) for part in ("self_attn.q_proj", "mlp.down_proj", "mlp.experts.1.up")
] + [f"transformer.h.{i}.{part}" for i in (0, 1) for part in ("attn.c_proj", "mlp.c_proj")]

WORDS = st.sampled_from(["q_proj", "down_proj", "c_proj", "proj", "up", "mlp.down_proj", NAMES[0], NAMES[-1]])


@settings(max_examples=150, deadline=None)
@given(
    target=st.one_of(
        st.lists(WORDS, min_size=1, max_size=3), st.sampled_from(["q_proj", r"model\.layers\.1.mlp.down_proj"])
    ),
    exclude=st.one_of(st.none(), st.lists(WORDS, max_size=2), WORDS),
    layers=st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 11), max_size=2)),
    pattern=st.sampled_from([None, "layers", "h", ["h", "layers"], "model.layers"]),
    saved=st.one_of(st.none(), st.lists(st.sampled_from(["mlp", "q_proj", "lm_head"]), max_size=2)),
)
def test_targets_match_as_in_peft(target, exclude, layers, pattern, saved):
    if isinstance(target, str):
        layers = pattern = None
    if layers in (None, []):
        pattern = None
    config = LoRASpec(
        target_modules=target,
        exclude_modules=exclude,
        layers_to_transform=layers,
        layers_pattern=pattern,
        modules_to_save=saved,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "_PLAIN", targets.re.compile(".*"))  # these expressions are harmless: match them here
        ours = match_targets(config, NAMES)
    theirs = [name for name in NAMES if is_target(config, name)]
    assert ours == theirs


def is_target(config: LoRASpec, name: str) -> bool:
    result = check_target_module_exists(config, name)
    return bool(result) and type(result).__name__ != "_ExcludedModule"


def test_regular_expressions_match_as_in_peft():
    expression = r"(?:.*?(?:layers|h).*?(?:mlp|attn).*?(?:q_proj|c_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.up)"
    config = LoRASpec(target_modules=expression, exclude_modules=r".*\.(0|9)\..*")
    assert match_targets(config, NAMES) == [name for name in NAMES if is_target(config, name)]
    assert match_targets(config, NAMES)


def test_patterns_give_the_value_of_the_first_that_matches():
    patterns = {"down_proj": 1, r"layers\.1[0-9]\..*": 2, "^transformer.h.0.attn.c_proj": 3, ".*proj": 4}
    ours = targets.pattern_values(patterns, NAMES, 0)
    assert ours == {name: patterns.get(get_pattern_key(list(patterns), name), 0) for name in NAMES}
    assert set(ours.values()) == {0, 1, 2, 3, 4}


def test_a_pattern_for_every_module_of_a_large_model(base):
    names = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(80) for part in "qkvo"]
    ranks = targets.pattern_values({name: i for i, name in enumerate(names)}, names, -1)
    assert ranks == {name: i for i, name in enumerate(names)}


def test_all_linear(base):
    assert match_targets(LoRASpec(target_modules="All-Linear"), base.linears) == list(base.linears)


@pytest.mark.parametrize("expression", [r"(\w+\.?)+!", "(", "a{9999999999}", "(" * 4000])
def test_hostile_expressions_end_in_time(monkeypatch, base, expression):
    monkeypatch.setattr(targets, "MAX_REGEX_SECONDS", 1)
    with pytest.raises(InvalidAdapterError, match="regular expression"):
        match_targets(LoRASpec(target_modules=expression), base.linears)


@pytest.mark.parametrize("command", [["false"], ["sh", "-c", "kill -9 $$"], ["sleep", "600"], ["/nowhere"]], ids=str)
def test_a_matcher_that_fails_is_not_the_adapters_fault(monkeypatch, base, command):
    monkeypatch.setattr(targets, "python", lambda *arguments: command)
    monkeypatch.setattr(targets, "MAX_REGEX_WAIT", 0.5)
    with pytest.raises(TuckaError, match="process failed") as caught:
        match_targets(LoRASpec(target_modules=r".*_proj"), base.linears)
    assert caught.value.status == 500


# --- configurations that are refused ---


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff{}", "UTF-8"),
        (b'{"r": 1, "r": 2}', "duplicate"),
        (b'{"r": NaN}', "NaN"),
        (b'{"r": 1e999}', "range"),
        (b'{"r": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b'{"r": "\\ud800"}', "UTF-8"),
        (b'{"r": ' + b"[" * 100 + b"]" * 100 + b"}", "nested"),
        (b'{"r": ' + b"[" * 100_000, "nested"),
        (b" " * (2**20 + 1), "larger than"),
    ],
)
def test_configuration_that_is_no_json(tmp_path, base, text, why):
    with pytest.raises(InvalidAdapterError, match=why):
        read_adapter(put(tmp_path, text, tucka_tensors(base)), base)


@pytest.mark.parametrize(
    "changes",
    [
        *({"r": value} for value in (True, "8", 0, -1, 1e9, 10**9, 8.0, None, [2], 513)),
        *({"alpha": value} for value in ("16", True, None, 1e300, 10**400, [])),
        *({name: value} for name in "ktp" for value in (0, 65, True, "2", None)),
        {"k": 64, "t": 64},
        *({"target_modules": value} for value in (None, [], "", {}, 3, [1], [""], ["x" * 300], ["q_proj"] * 5000)),
        *({"target_modules": value} for value in ("(", "x" * 5000)),
        *({"modules_to_save": value} for value in ("lm_head", [1], {"a": 1}, [""])),
        *({"layers_to_transform": value} for value in ("1", [True], [-1], 1.0, {}, [10**9])),
        {"layers_to_transform": [1], "target_modules": ".*q_proj"},
        {"layers_pattern": "layers"},
        {"layers_pattern": "(a+)+", "layers_to_transform": [0]},
        {"exclude_modules": 3},
        {"router_name": None},
        {"router_name": "q_proj"},
        {"router_name": "model.layers.0.self_attn.o_proj"},
        {"router_name": "model.layers.1.self_attn.q_proj"},
        {"use_alb": "yes"},
        {"peft_type": None},
        {"peft_type": "LOHA"},
        {"peft_type": ["TUCKA"]},
        *({name: value} for name in ("auto_mapping", "auto_map", "trust_remote_code") for value in ({"a": "b"}, False)),
        {"auto_mapping": {"base_model_class": 3}},
        {"auto_mapping": {"base_model_class": "x" * 5000}},
        {"some_future_field": 1},
        {"base_model_class": "os.system"},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["proj"]},
    ],
    ids=str,
)
def test_configuration_that_is_refused(tmp_path, base, changes):
    with pytest.raises(InvalidAdapterError) as error:
        read_adapter(put(tmp_path, tucka_config(**changes), tucka_tensors(base)), base)
    assert str(tmp_path) not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True, "lora_bias": True},
        {"use_dora": 1},
        {"layer_replication": [[0, 1]]},
        {"megatron_config": {"a": 1}},
        {"target_parameters": ["x"]},
        *(
            {"trainable_token_indices": value}
            for value in ([-1], [1, 1], [True], "x", 3, {"lm_head": 3}, {"norm": [1]})
        ),
        {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
        {"lora_bias": True, "target_modules": ["q_proj", "embed_tokens"]},
        {"alora_invocation_tokens": [1]},
        {"use_qalora": True},
        {"ensure_weight_tying": True},
        {"kasa_config": {"a": 1}},
        {"arrow_config": {"a": 1}},
        {"use_bdlora": {"a": 1}},
        {"init_lora_weights": "pissa_niter_4"},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"(": 2}},
        {"rank_pattern": [1]},
        {"alpha_pattern": {"q_proj": "1"}},
        {"use_rslora": 1},
        {"lora_alpha": None},
    ],
    ids=str,
)
def test_lora_configuration_that_is_refused(tmp_path, base, changes):
    with pytest.raises(InvalidAdapterError) as error:
        read_adapter(put(tmp_path, lora_config(**changes), lora_tensors(base)), base)
    assert next(iter(changes)) in str(error.value) or "regular expression" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "what_to_do"),
    [
        ({"use_qalora": True}, "merge_and_unload"),
        ({"use_dora": True}, r"lacks \d+ tensors.*lora_magnitude_vector"),
        ({"lora_bias": True}, r"lacks \d+ tensors.*lora_B.bias"),
        ({"trainable_token_indices": {"norm": [1]}}, "`embed_tokens`, `lm_head`"),
        ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, "one of them"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"auto_mapping": {"loader": "os"}}, "Set it to null"),
    ],
    ids=str,
)
def test_a_refusal_says_what_to_do(tmp_path, base, changes, what_to_do):
    with pytest.raises(InvalidAdapterError, match=what_to_do):
        read_adapter(put(tmp_path, lora_config(**changes), lora_tensors(base)), base)


def test_a_class_that_is_named_for_the_base_is_ignored(tmp_path, base, caplog):
    mapping = {"base_model_class": "Zen", "parent_library": "this"}
    folder = put(tmp_path, lora_config(auto_mapping=mapping), lora_tensors(base))
    assert read_adapter(folder, base).kind == "lora"
    assert "`auto_mapping`, which is ignored" in caplog.text and "this" not in sys.modules


def test_neutral_unknown_fields_are_accepted(tmp_path, base):
    config = lora_config(use_dora=False, field_of_tomorrow=None, other={}, another=[], text="", megatron_core="x")
    assert read_adapter(put(tmp_path, config, lora_tensors(base)), base).kind == "lora"


def test_hostile_names_are_not_repeated(tmp_path, base):
    hostile = "\x1b[31m\r\nx" * 100
    with pytest.raises(InvalidAdapterError) as error:
        read_adapter(put(tmp_path / "a", tucka_config(**{hostile: 1}), tucka_tensors(base)), base)
    assert "\x1b" not in str(error.value) and "\n" not in str(error.value)
    tensors = {**tucka_tensors(base), hostile: torch.zeros(1), **{f"x{i}": torch.zeros(1) for i in range(500)}}
    with pytest.raises(InvalidAdapterError, match="501 tensors") as error:
        read_adapter(put(tmp_path / "b", tucka_config(), tensors), base)
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 1000


# --- weights that are refused ---


def truncated(weights: bytes) -> bytes:
    return weights[:-1]


def trailing(weights: bytes) -> bytes:
    return weights + b"\0"


def only_a_length(weights: bytes) -> bytes:
    return weights[:4]


def empty(weights: bytes) -> bytes:
    return b""


def endless_header(weights: bytes) -> bytes:
    return b"\xff" * 8 + weights[8:]


def header_over_the_limit(weights: bytes) -> bytes:
    header, data = split(weights)
    return join(json.dumps(header).encode() + b" " * MAX_HEADER_BYTES, data)


def many_entries(weights: bytes) -> bytes:
    header, data = split(weights)
    nothing = ',"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    return join(json.dumps(header)[:-1].encode() + "".join(map(nothing.format, range(200_000))).encode() + b"}", data)


def header_is_a_list(weights: bytes) -> bytes:
    return join(b"[]", split(weights)[1])


def deep_header(weights: bytes) -> bytes:
    return join(b'{"a":' * 90_000, b"")


def duplicate_names(weights: bytes) -> bytes:
    header, data = split(weights)
    first = json.dumps(next(iter(header)))
    return join(json.dumps(header).encode()[:-1] + f", {first}: null}}".encode(), data)


def change(**fields: Any):
    def changed(weights: bytes) -> bytes:
        header, data = split(weights)
        name = next(name for name in header if name != "__metadata__")
        header[name] |= fields
        return join(header, data)

    return changed


def holes(weights: bytes) -> bytes:
    header, data = split(weights)
    for entry in [value for name, value in header.items() if name != "__metadata__"]:
        entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
    return join(header, b"\0" * 4 + data)


def overlap(weights: bytes) -> bytes:
    header, data = split(weights)
    same = [name for name, value in header.items() if value.get("shape") == [K, P, R, R]]
    header[same[1]]["data_offsets"] = header[same[0]]["data_offsets"]
    return join(header, data)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (truncated, "truncated"),
        (trailing, "trailing"),
        (only_a_length, "shorter"),
        (empty, "shorter"),
        (endless_header, "shorter"),
        (header_over_the_limit, "header is larger"),
        (many_entries, "header is larger"),
        (header_is_a_list, "not a JSON object"),
        (deep_header, "nested"),
        (duplicate_names, "duplicate"),
        (holes, "holes"),
        (overlap, "overlap"),
        (change(dtype="I64"), "dtype"),
        (change(dtype=["F32"]), "dtype"),
        (change(shape=[0, 2**40]), "shape"),
        (change(shape=[2**62, 2**62]), "agree"),
        (change(shape=[10**4000] * 8), "agree"),
        (change(shape=[True, 6]), "shape"),
        (change(shape=[1.0]), "shape"),
        (change(shape=[1] * 100_000), "shape"),
        (change(shape=None), "shape"),
        (change(data_offsets=[-4, 4]), "data_offsets"),
        (change(data_offsets=[8, 4]), "data_offsets"),
        (change(data_offsets=[0]), "data_offsets"),
        (change(data_offsets="04"), "data_offsets"),
        (change(extra=1), "exactly dtype"),
    ],
)
def test_weights_file_that_is_refused(tmp_path, base, broken, why):
    weights = save(tucka_tensors(base), metadata={"format": "pt"})
    with pytest.raises(InvalidAdapterError, match=why):
        read_adapter(put(tmp_path, tucka_config(), broken(weights)), base)


@pytest.mark.parametrize("metadata", [{"a": 1}, [], "x"])
def test_metadata_must_be_strings(tmp_path, base, metadata):
    header, data = split(save(tucka_tensors(base)))
    with pytest.raises(InvalidAdapterError, match="__metadata__"):
        read_adapter(put(tmp_path, tucka_config(), join({"__metadata__": metadata, **header}, data)), base)


def test_a_huge_tensor_is_refused_before_it_is_read(tmp_path, base):
    """The file is sparse: 7 GiB by its size, nothing on the disk. Reading it would take minutes and all memory."""
    size = 7 * 2**30
    header = {f"{PREFIX}lm_head.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    put(tmp_path, tucka_config(), join(header, b""))
    os.truncate(tmp_path / WEIGHTS_NAME, os.path.getsize(tmp_path / WEIGHTS_NAME) + size)
    with pytest.raises(AdapterError):
        read_adapter(tmp_path, base)


FIRST = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [f"{FIRST}.tucka_g", f"{FIRST}.tucka_ec", f"{PREFIX}lm_head.weight"])
def test_values_that_are_not_finite(tmp_path, base, name, value):
    tensors = {**tucka_tensors(base), f"{PREFIX}lm_head.weight": torch.randn(16, 6)}
    tensors[name].view(-1)[-1] = value
    with pytest.raises(InvalidAdapterError, match="NaN, infinite"):
        read_adapter(put(tmp_path, tucka_config(modules_to_save=["lm_head"]), tensors), base)


def test_values_beyond_fp32(tmp_path, base):
    tensors = {name: tensor.double() for name, tensor in tucka_tensors(base).items()}
    tensors[f"{FIRST}.tucka_u"][0, 0] = 1e300
    with pytest.raises(InvalidAdapterError, match="beyond fp32"):
        read_adapter(put(tmp_path, tucka_config(), tensors), base)


@pytest.mark.parametrize("factor", [0.0, 1e-25, 1e25])
@pytest.mark.parametrize("part", ["tucka_g", "tucka_c", "tucka_u", "tucka_ec"])
def test_blocks_whose_norm_cannot_be_divided_by(tmp_path, base, part, factor):
    tensors = tucka_tensors(base)
    name = f"{FIRST}.{part}"
    rows = tensors[name].view(K, -1) if part in ("tucka_g", "tucka_ec") else tensors[name].view(1, -1)
    rows[-1] *= factor
    with pytest.raises(InvalidAdapterError, match="norm"):
        read_adapter(put(tmp_path, tucka_config(), tensors), base)


def without(tensors, *endings):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(endings)}


@pytest.mark.parametrize(
    ("changes", "tensors", "error"),
    [
        ({}, lambda b: without(tucka_tensors(b), "0.self_attn.q_proj.tucka_u"), InvalidAdapterError),
        ({}, lambda b: without(tucka_tensors(b), "tucka_ec"), InvalidAdapterError),
        ({}, lambda b: {**tucka_tensors(b), "extra": torch.ones(1)}, InvalidAdapterError),
        ({}, lambda b: {**tucka_tensors(b), f"{FIRST}.bias": torch.ones(6)}, InvalidAdapterError),
        ({}, lambda b: lora_tensors(b, "q_proj", "v_proj"), InvalidAdapterError),
        ({"modules_to_save": ["lm_head"]}, tucka_tensors, InvalidAdapterError),
        ({"t": 3}, tucka_tensors, InvalidAdapterError),
        ({"r": 3}, tucka_tensors, InvalidAdapterError),
        ({"modules_to_save": ["score"]}, tucka_tensors, BaseModelMismatchError),
        ({"target_modules": ["c_attn"]}, tucka_tensors, BaseModelMismatchError),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, tucka_tensors, BaseModelMismatchError),
        (
            {},
            lambda b: without(tucka_tensors(b), *(f"1.self_attn.q_proj.tucka_{x}" for x in "gcu")),
            BaseModelMismatchError,
        ),
        (
            {},
            lambda b: {**tucka_tensors(b), f"{PREFIX}model.layers.9.self_attn.q_proj.tucka_u": torch.ones(6, R)},
            BaseModelMismatchError,
        ),
        ({}, lambda b: {**tucka_tensors(b), f"{FIRST}.tucka_u": torch.ones(7, R)}, BaseModelMismatchError),
        ({}, lambda b: {**tucka_tensors(b), f"{FIRST}.tucka_ec": torch.ones(K * T, 7)}, BaseModelMismatchError),
        (
            {"modules_to_save": ["lm_head"]},
            lambda b: {**tucka_tensors(b), f"{PREFIX}lm_head.weight": torch.ones(17, 6)},
            BaseModelMismatchError,
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, base, changes, tensors, error):
    with pytest.raises(error) as raised:
        read_adapter(put(tmp_path, tucka_config(**changes), tensors(base)), base)
    assert type(raised.value) is error


def test_lora_on_an_embedding_or_with_biases(tmp_path, base):
    embedding = {f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(R, 16)}
    config = lora_config(target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(InvalidAdapterError, match=r"model\.embed_tokens"):
        read_adapter(put(tmp_path / "a", config, {**lora_tensors(base, "q_proj"), **embedding}), base)
    biased = {**lora_tensors(base), f"{FIRST}.base_layer.bias": torch.ones(6)}
    with pytest.raises(InvalidAdapterError, match="where they have one"):
        read_adapter(put(tmp_path / "b", lora_config(bias="lora_only"), biased), base)
    embedded = {**lora_tensors(base), f"{PREFIX}model.embed_tokens.weight": torch.ones(16, 6)}
    assert set(read_adapter(put(tmp_path / "c", lora_config(), embedded), base).saved) == {"model.embed_tokens.weight"}
    grown = {**lora_tensors(base), f"{PREFIX}model.embed_tokens.weight": torch.ones(17, 6)}
    with pytest.raises(BaseModelMismatchError, match="resize_token_embeddings"):
        read_adapter(put(tmp_path / "d", lora_config(), grown), base)
    config = lora_config(trainable_token_indices=[16])
    with pytest.raises(BaseModelMismatchError, match="resize_token_embeddings"):
        read_adapter(put(tmp_path / "e", config, lora_tensors(base)), base)


@pytest.mark.parametrize(
    ("theirs", "ours", "warns"),
    [
        ("meta-llama/Llama-3-8B", "/models/llama-3-8b/", False),
        ("meta-llama/Llama-3-8B", "/hub/models--meta-llama--Llama-3-8B/snapshots/0123abcd", False),
        ("C:\\models\\tiny", "tiny", False),
        ("meta-llama/Llama-3-8B", "/models/llama-3-8b-instruct", True),
        ("a\nb" + "x" * 4000, "tiny", True),
        (None, "tiny", False),
        ("", "tiny", False),
        ("tiny", "", False),
        ("tiny", ".", False),
    ],
)
def test_a_base_of_another_name_is_said(tmp_path, base, caplog, theirs, ours, warns):
    put(tmp_path, lora_config(base_model_name_or_path=theirs), lora_tensors(base))
    read_adapter(tmp_path, replace(base, name=ours))
    assert len(caplog.records) == warns
    if warns:
        message = caplog.messages[0]
        assert theirs.split("/")[-1][:1] in message and ours.split("/")[-1] in message
        assert "\n" not in message and len(message) < 1000
    caplog.clear()
    (tmp_path / TRAINING_NAME).write_text(json.dumps({"base_fingerprint": base.fingerprint}))
    read_adapter(tmp_path, replace(base, name=ours))
    assert not caplog.records, "the fingerprint has decided it"


# --- folders that are refused ---


@pytest.mark.parametrize("kind", ["bin", "pt", "pkl"])
def test_pickled_weights_are_never_opened(tmp_path, base, kind):
    put(tmp_path, tucka_config(), b"")
    (tmp_path / WEIGHTS_NAME).unlink()
    os.mkfifo(tmp_path / f"adapter_model.{kind}")  # opening it would wait for ever
    with pytest.raises(InvalidAdapterError, match="pickled"):
        read_adapter(tmp_path, base)


def test_a_folder_of_several_adapters_is_said(tmp_path, base):
    """PEFT's layout for adapters that have names of their own."""
    for name in ("law", "tax"):
        put(tmp_path / name, lora_config(), lora_tensors(base))
    with pytest.raises(InvalidAdapterError, match="Give the subfolder"):
        read_adapter(tmp_path, base)
    assert read_adapter(tmp_path / "law", base).kind == "lora"


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_only_regular_files_are_opened(tmp_path, base, name):
    folder = put(tmp_path / "adapter", tucka_config(), tucka_tensors(base))
    (folder / name).rename(tmp_path / name)
    with pytest.raises(InvalidAdapterError, match="has no"):
        read_adapter(folder, base)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(InvalidAdapterError, match="symbolic link"):
        read_adapter(folder, base)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InvalidAdapterError, match="not a regular file"):
        read_adapter(folder, base)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(InvalidAdapterError, match="not a regular file"):
        read_adapter(folder, base)


@pytest.mark.parametrize("folder", ["nowhere", "file", "a\0b", "x" * 5000])
def test_folder_that_is_none(tmp_path, base, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidAdapterError, match="folder does not exist"):
        read_adapter(tmp_path / folder, base)


def test_row_35_a_file_swapped_between_check_and_read(tmp_path, base, monkeypatch):
    """The files are swapped between the check of the header and the reading of the tensors."""
    first, second = tucka_tensors(base), tucka_tensors(base)
    folder = put(tmp_path / "a", tucka_config(), first)
    digest = read_adapter(folder, base).digest
    put(tmp_path / "b", tucka_config(alpha=1), second)

    def swap_then_read(*args):
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            os.replace(tmp_path / "b" / name, folder / name)
        return read_tensors(*args)

    monkeypatch.setattr(adapter_format, "read_tensors", swap_then_read)
    adapter = read_adapter(folder, base)
    assert adapter.digest == digest and adapter.config.alpha == 16
    assert adapter.ec is not None and torch.equal(adapter.ec, first[f"{FIRST}.tucka_ec"])


# --- anything at all ---

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=300, deadline=2000)
@given(
    peft_type=st.sampled_from(["TUCKA", "LORA"]),
    changes=st.dictionaries(
        st.one_of(st.sampled_from([*TuckASpec.__dataclass_fields__, *LoRASpec.__dataclass_fields__]), st.text()),
        JSON,
        min_size=1,
        max_size=3,
    ),
)
def test_any_configuration_is_read_or_refused(peft_type, changes):
    config = {**(tucka_config() if peft_type == "TUCKA" else lora_config()), **changes}
    try:
        read = parse_config(json.dumps(config).encode())
    except InvalidAdapterError:
        return
    assert parse_config(json.dumps(config_fields(read)).encode()) == read
    assert isinstance(read, LoRASpec) or read.k * read.t <= MAX_CENTROIDS


@settings(max_examples=300, deadline=2000)
@given(data=st.data())
def test_any_weights_file_is_read_or_refused(data):
    original = save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16)}, metadata={"format": "pt"})
    weights = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        weights[data.draw(st.integers(0, len(weights) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(weights)))
    weights = weights[:cut] if data.draw(st.booleans()) else weights
    digest = start_digest(b"", len(weights))
    with io.BytesIO(bytes(weights)) as file:
        try:
            entries = read_header(file, len(weights), digest)
        except InvalidAdapterError:
            return
        tensors = {}
        for name, entry in entries.items():
            numbers = torch.empty(math.prod(entry.shape), dtype=entry.dtype)
            tensors |= read_tensors(file, {name: entry}, numbers, digest)
    theirs = load(bytes(weights))  # what is accepted here, the safetensors library reads the same way
    assert tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, equal_nan=True)


@settings(max_examples=200, deadline=2000)
@given(st.one_of(st.binary(max_size=64), JSON.map(lambda value: json.dumps(value).encode())))
def test_strict_json_raises_nothing_but_value_errors(data):
    try:
        value = strict_json(data)
    except ValueError:
        return
    assert json.loads(data) == value


def test_a_byte_order_mark_may_begin_an_adapters_json(tmp_path, base: BaseLayout):
    folder = put(tmp_path, tucka_config(), tucka_tensors(base))
    config = folder / CONFIG_NAME
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    (folder / TRAINING_NAME).write_text('{"route": "request"}', "utf-8-sig")
    assert read_adapter(folder, base).training == {"route": "request"}


def test_modules_are_what_the_engine_expects(tmp_path, base: BaseLayout):
    adapter = read_adapter(put(tmp_path, tucka_config(), tucka_tensors(base)), base)
    for module in adapter.modules.values():
        assert isinstance(module, TuckAModule)
        assert (module.g.shape, module.c.shape, module.u.shape) == ((K, P, R, R), (T, P), (6, R))


def test_tensors_with_an_adapters_name_in_theirs(tmp_path, base):
    tensors = {name.replace(".weight", ".default.weight"): value for name, value in lora_tensors(base).items()}
    with pytest.raises(InvalidAdapterError, match=r"save_pretrained.*lora_A\.default"):
        read_adapter(put(tmp_path, lora_config(), tensors), base)


def test_what_zero_3_leaves_is_not_blamed_on_the_base(tmp_path, base):
    with pytest.raises(InvalidAdapterError, match=r"no tensors.*ZeRO-3"):
        read_adapter(put(tmp_path / "none", lora_config(), {}), base)
    empty = {name: value[:0] for name, value in lora_tensors(base).items()}
    with pytest.raises(InvalidAdapterError, match=r"a tensor is empty.*ZeRO-3"):
        read_adapter(put(tmp_path / "empty", lora_config(), empty), base)


def test_another_kind_is_said_before_what_is_in_it(tmp_path, base):
    config = lora_config(peft_type="LOHA", auto_mapping={"base_model_class": "X"})
    with pytest.raises(InvalidAdapterError, match="`peft_type` is LOHA, not TUCKA, LORA or TUCKA_BANK"):
        read_adapter(put(tmp_path, config, lora_tensors(base)), base)


def test_errors_about_modules_list_those_that_exist(tmp_path, base):
    with pytest.raises(BaseModelMismatchError, match=r"linears are called .*`q_proj`"):
        read_adapter(put(tmp_path / "a", lora_config(target_modules=["c_attn"]), lora_tensors(base)), base)
    with pytest.raises(BaseModelMismatchError, match=r"are called .*`lm_head`"):
        read_adapter(put(tmp_path / "b", lora_config(modules_to_save=["score"]), lora_tensors(base)), base)
