"""What an adapter's files are checked against: the linears and parameters of a base model. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from tucka_runtime.models.architecture import Architecture, parameter_shapes


@dataclass(frozen=True)
class BaseLayout:
    """What an adapter needs to know of a base model.

    linears: dotted module path -> (d_in, d_out) of every linear an adapter may adapt, in the order they are declared,
    which is the order they run in; the head is not among them. parameters: name -> shape of every parameter that
    `modules_to_save` may replace, as the base stores it (Conv1D weights are (in, out)). fingerprint: identity of the
    base's weights. name: its path, or what else it is called; empty where nobody knows. embed, head: the paths of the
    embedding and of the head, both (vocab, d); tied: whether these are one.
    """

    linears: Mapping[str, tuple[int, int]]
    parameters: Mapping[str, tuple[int, ...]]
    fingerprint: str
    name: str = ""
    embed: str = ""
    head: str = ""
    tied: bool = False

    @property
    def tables(self) -> tuple[str, ...]:
        """The embedding and the head."""
        return tuple(path for path in (self.embed, self.head) if path)


def base_layout(arch: Architecture, fingerprint: str, name: str = "") -> BaseLayout:
    """What adapters/format.py checks an adapter against."""
    linears = {
        arch.path(i, target): (site.d_in, width)
        for i in range(arch.num_layers)
        for site in arch.sites
        for target, width in zip(site.targets, site.widths, strict=True)
    }
    shapes = dict(parameter_shapes(arch))
    return BaseLayout(linears, shapes, fingerprint, name, arch.embed, arch.head, arch.tied)
