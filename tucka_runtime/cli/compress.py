"""`tucka compress`: makes one bank of many adapters (adapters/joint.py), and says what that changes of each."""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tucka_runtime.adapters.config import BankSpec, TuckASpec
from tucka_runtime.adapters.config_fields import MAX_ENTRIES, MAX_MEMBER, MAX_RANK, is_member
from tucka_runtime.adapters.files import WEIGHTS_NAME
from tucka_runtime.adapters.format import Adapter, BankModule, BaseLayout, LoRAModule, read_adapter, write_adapter
from tucka_runtime.adapters.joint import diagonalise, relative_errors
from tucka_runtime.bases import command_base
from tucka_runtime.cli.adapter_files import CPU, factors_dtype, open_base, parse_route
from tucka_runtime.engine.adapters.fold import fold, locate
from tucka_runtime.engine.adapters.footprint import folded_bytes
from tucka_runtime.engine.adapters.verify import KEY
from tucka_runtime.engine.turns import whole
from tucka_runtime.errors import ConfigError
from tucka_runtime.kernels import dispatch
from tucka_runtime.kernels.reference.linear import linear
from tucka_runtime.llm import LLM
from tucka_runtime.messages import Route, SamplingParams
from tucka_runtime.models.architecture import Architecture
from tucka_runtime.models.weights import Weights, load_weights

Changes = dict[str, tuple[Tensor, Tensor]]
"""By its path, each linear's change as b (d_out, r) and a (r, d_in): y += b a x."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "members", nargs="+", metavar="[NAME=]PATH", help="an adapter's folder; its name is the folder's unless given"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, for the bank")
    parser.add_argument("--rank", type=int, required=True, metavar="R", help="of the shared basis")
    parser.add_argument("--model", required=True, metavar="MODEL", help="the adapters' base")
    parser.add_argument(
        "--core", choices=("full", "diagonal"), default="full", help="what is kept of a member (default: full)"
    )
    parser.add_argument(
        "--route", metavar="ROUTE", help="the route of TuckA members, as tucka adapters export takes it"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts, one a line: compare every member's answers to them"
    )
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N", help="of such an answer (default: 32)")


@dataclass(frozen=True)
class BankMember:
    """An adapter that goes into the bank. `route` is a TuckA adapter's."""

    name: str
    folder: Path
    adapter: Adapter
    route: Route | None


@dataclass(frozen=True)
class BankBase:
    """What members are read against, and, only where a TuckA adapter is to be folded, its weights."""

    arch: Architecture
    layout: BaseLayout
    dtype: torch.dtype
    weights: Weights | None = None


def run(flags: argparse.Namespace) -> int:
    if not 0 < flags.rank <= MAX_RANK:
        raise ConfigError(f"--rank must be from 1 to {MAX_RANK}.")
    if (flags.out / "adapter_config.json").exists():
        raise ConfigError("There is an adapter in the target folder. Name a new one.")
    prompts = read_prompts(flags.prompts) if flags.prompts else []
    model = command_base(flags.model)
    base = BankBase(*open_base(model))
    members = [_member(name, folder, base, flags.route) for name, folder in names(flags.members)]
    if any(member.route for member in members):
        weights, _ = load_weights(model, base.arch, "float32", CPU, linear)
        base = replace(base, weights=weights)
    with torch.inference_mode():
        errors = compress(members, base, flags.out, flags.rank, flags.core)
    _print(members, base, flags.out, errors)
    if prompts:
        _print_answers(compare(members, model, flags.out, prompts, flags.max_tokens))
    return 0


def names(given: Sequence[str]) -> list[tuple[str, Path]]:
    """The members' names and folders. Raises ConfigError."""
    pairs = [text.split("=", 1) if "=" in text else (Path(text).resolve().name, text) for text in given]
    for name, path in pairs:
        if not is_member(name):
            raise ConfigError(
                f"{path}: a member's name must be 1 to {MAX_MEMBER} letters, digits or characters of `. _ @ -`. "
                "Write NAME=PATH."
            )
    if len({name for name, _ in pairs}) < len(pairs):
        raise ConfigError("Two members have the same name. Write NAME=PATH.")
    if len(pairs) > MAX_ENTRIES:
        raise ConfigError(f"A bank has at most {MAX_ENTRIES} members. Make several.")
    return [(name, Path(path)) for name, path in pairs]


def read_prompts(path: Path) -> list[str]:
    """The lines of a file. Raises ConfigError."""
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise ConfigError(f"The file of prompts cannot be read: {error}") from None
    if not lines:
        raise ConfigError("The file of prompts is empty.")
    return lines


def _member(name: str, folder: Path, base: BankBase, route: str | None) -> BankMember:
    """Raises ConfigError for what a bank cannot hold, AdapterError for what is no adapter of this base."""
    adapter = read_adapter(folder, base.layout)
    if isinstance(adapter.config, BankSpec):
        raise ConfigError(f"{name} is a bank itself. Make a new one of its members' own folders.")
    if adapter.saved or adapter.tokens or adapter.modules.keys() - base.layout.linears.keys():
        raise ConfigError(
            f"{name} changes the embedding or the head, or replaces parameters of the base, which a bank cannot hold. "
            "Serve it by itself."
        )
    if any(isinstance(module, LoRAModule) and module.changes_base for module in adapter.modules.values()):
        raise ConfigError(f"{name} is a DoRA or has biases, which a bank cannot hold. Serve it by itself.")
    if not isinstance(adapter.config, TuckASpec):
        return BankMember(name, folder, adapter, None)
    if route is None:
        raise ConfigError(f"{name} is a TuckA adapter, of which a bank holds one route: say --route, such as group=0.")
    return BankMember(name, folder, adapter, parse_route(route, adapter.config))


def changes(member: BankMember, base: BankBase) -> Changes:
    """What a member adds to each linear, in fp32."""
    if member.route is None:
        lora = {path: m for path, m in member.adapter.modules.items() if isinstance(m, LoRAModule)}
        return {path: (m.b * m.scale, m.a) for path, m in lora.items()}
    assert base.weights is not None
    ops = dispatch.backend("reference")
    folded = whole(fold(KEY, member.adapter, base.arch, base.weights, ops, torch.float32, member.route))
    where = locate(base.arch)
    pairs = {path: folded.factors[where[path]] for path in member.adapter.modules}
    return {path: (e.T, u) for path, (u, e) in pairs.items()}


def compress(members: Sequence[BankMember], base: BankBase, out: Path, rank: int, core: str) -> list[float]:
    """Writes the bank; the relative error of each member's change, over all linears together, as it was written."""
    own = [changes(member, base) for member in members]
    targets = [path for path in base.layout.linears if any(path in change for change in own)]
    tensors: dict[str, Tensor] = {}
    lost, whole = torch.zeros(len(members), dtype=torch.float64), torch.zeros(len(members), dtype=torch.float64)
    for path in targets:
        b, a = _stacked([change.get(path) for change in own], *base.layout.linears[path])
        joint = diagonalise(b, a, rank, core == "diagonal")
        u, cores, v = joint.u.float(), joint.cores.float(), joint.v.float()
        errors, norms = relative_errors(b, a, u, cores, v)
        lost, whole = lost + errors.square(), whole + norms.square()
        # The files say ((x uᵀ) core) e: what is V here is u there, and cores are transposed.
        tensors[f"{path}.bank_u"], tensors[f"{path}.bank_e"] = v.contiguous(), u.T.contiguous()
        tensors[f"{path}.bank_core"] = (cores.mT if cores.dim() == 3 else cores).contiguous()
    config = BankSpec(rank, core, [member.name for member in members], targets, "CAUSAL_LM", base.layout.name)
    write_adapter(out, config, tensors, {"base_fingerprint": base.layout.fingerprint})
    return (lost / whole.where(whole > 0, 1)).sqrt().tolist()


def _stacked(pairs: list[tuple[Tensor, Tensor] | None], d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """b (N, d_out, r) and a (N, r, d_in) in float64, smaller ranks and absent changes filled up with zeros."""
    rank = max(a.shape[0] for _, a in filter(None, pairs))
    b, a = (torch.zeros(len(pairs), *shape, dtype=torch.float64) for shape in ((d_out, rank), (rank, d_in)))
    for i, pair in enumerate(pairs):
        if pair is not None:
            b[i, :, : len(pair[1])], a[i, : len(pair[1])] = pair
    return b, a


def compare(members: Sequence[BankMember], model: Path, out: Path, prompts: list[str], length: int) -> list[float]:
    """The share of prompts to which each member in the bank gives, greedily, the very answer that it gives alone."""
    llm = LLM(model, {"bank": out})
    sampling = SamplingParams(max_tokens=length, temperature=0)
    same = []
    for member in members:
        llm.load_adapter("alone", member.folder, member.route)
        alone, banked = (llm.generate(prompts, sampling, name) for name in ("alone", f"bank/{member.name}"))
        pairs = zip(alone, banked, strict=True)
        same.append(statistics.mean(own.outputs[0].token_ids == its.outputs[0].token_ids for own, its in pairs))
    return same


def _print(members: Sequence[BankMember], base: BankBase, out: Path, errors: list[float]) -> None:
    bank = read_adapter(out, base.layout)
    assert isinstance(bank.config, BankSpec)
    factors = factors_dtype(dispatch.choose(CPU, "auto"), base.dtype)
    each = [folded_bytes(m.adapter, base.arch, base.dtype, factors, m.route)[0] for m in members]
    resident = folded_bytes(bank, base.arch, base.dtype, factors, None)[0]
    core = sum(module.core[0].numel() for module in bank.modules.values() if isinstance(module, BankModule))
    worst = max(range(len(members)), key=lambda i: errors[i])
    before = sum((m.folder / WEIGHTS_NAME).stat().st_size for m in members)
    print(
        f"members   {len(members):,} on {len(bank.modules)} linears, a basis of rank {bank.config.r}, "
        f"{bank.config.core} cores\n"
        f"error     of a member's change, in Frobenius norm: min {min(errors):.2g}, "
        f"median {statistics.median(errors):.2g}, max {errors[worst]:.2g} ({members[worst].name})\n"
        f"on disk   {(out / WEIGHTS_NAME).stat().st_size:,} bytes; {before:,} before\n"
        f"resident  {resident:,} bytes, {core * factors.itemsize:,} of them for each member; {sum(each):,} before\n"
        f"digest    {bank.digest}"
    )


def _print_answers(same: list[float]) -> None:
    print(
        f"answers   the same to the last token as the member's own, greedily: min {min(same):.0%}, "
        f"median {statistics.median(same):.0%}, max {max(same):.0%} of the prompts"
    )
