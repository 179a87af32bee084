"""The modules and parameters of a net, found without the names that `nn.Module`'s own generators make up.

A chain's forward and backward ask for them at every evaluation, where those generators cost as much as a small layer.
"""

from collections.abc import Iterable

from torch import nn


def modules_of(*nets: nn.Module) -> list[nn.Module]:
    """The nets and all modules in them, each once."""
    found = list(dict.fromkeys(nets))
    seen = set(found)
    for module in found:  # grows
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def first_parameter(net: nn.Module) -> nn.Parameter | None:
    """Whichever comes first, since a net computes in one dtype."""
    for module in modules_of(net):
        for parameter in module._parameters.values():
            if parameter is not None:
                return parameter
    return None


def trained_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Those of these modules that need a gradient, each once."""
    every = (p for module in modules for p in module._parameters.values() if p is not None)
    return list(dict.fromkeys(p for p in every if p.requires_grad))
