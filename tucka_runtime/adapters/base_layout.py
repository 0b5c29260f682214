"""What an adapter's files are checked against: the linears and parameters of a base model. No torch."""

from tucka_runtime.messages import BaseLayout
from tucka_runtime.models.architecture import Architecture, parameter_shapes


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
