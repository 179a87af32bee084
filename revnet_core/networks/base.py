"""What all networks are: stem, stages of units, tail."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revnet_core.budget import Budgeted
from revnet_core.coupling import Coupling
from revnet_core.networks.layers import Stem, tail
from revnet_core.networks.units import UnitDesign, UnitShape
from revnet_core.offload import offloaded
from revnet_core.precision import Precision
from revnet_core.sequence import ReversibleSequence, replayed_checkpoint


@dataclass(frozen=True)
class Layout:
    """A network before it is built.

    units     of each stage; every stage but the first halves height and width
    channels  the width of each stage; the first is also the stem's
    """

    design: UnitDesign
    stem: Stem
    units: Sequence[int]
    channels: Sequence[int]

    @property
    def out_channels(self) -> int:
        return self.channels[-1] * self.design.expansion

    def stages(self) -> Iterator[list[UnitShape]]:
        in_channels = self.channels[0]
        for stage, (count, width) in enumerate(zip(self.units, self.channels, strict=True)):
            out_channels = width * self.design.expansion
            # The stem's batch norm and ReLU stand right in front of the very first unit.
            inside = width // self.design.narrowing
            first = UnitShape(in_channels, inside, out_channels, stride=2 if stage > 0 else 1, activate=stage > 0)
            yield [first, *[UnitShape(out_channels, inside, out_channels)] * (count - 1)]
            in_channels = out_channels


class Network(nn.Module):
    """An image classifier that knows its blocks: N,C,H,W images to N,num_classes logits.

    blocks             residual units
    reversible_blocks  those of them that can be rebuilt
    """

    # Whether a unit that is no coupling is recomputed from its stored input where couplings are reconstructed.
    recomputes_units: ClassVar[bool] = False

    blocks: int
    reversible_blocks: int

    def __init__(
        self,
        layout: Layout,
        *,
        num_classes: int,
        in_channels: int,
        activations: str | Budgeted,
        precision: Precision,
    ) -> None:
        super().__init__()
        self.activations = activations
        self.precision = precision
        self.stem = layout.stem(in_channels, layout.channels[0], layout.design.norm)
        self.stages = nn.ModuleList(nn.ModuleList(stage) for stage in self.build_stages(layout))
        self.tail = tail(layout.out_channels, num_classes, layout.design.norm)
        self.blocks = sum(layout.units)
        self.reversible_blocks = sum(
            isinstance(block, Coupling)
            for module in self.modules_in_order()
            if isinstance(module, ReversibleSequence)
            for block in module.couplings
        )

    def build_stages(self, layout: Layout) -> list[list[nn.Module]]:
        """By default stage by stage; a network whose stages are one chain builds that instead."""
        return [self.build_stage(layout.design, shapes) for shapes in layout.stages()]

    def build_stage(self, design: UnitDesign, shapes: Sequence[UnitShape]) -> list[nn.Module]:
        """What the stage's units become, in order; `shapes` are those of whole units, of both streams together."""
        raise NotImplementedError

    def modules_in_order(self) -> Iterator[nn.Module]:
        """What `build_stages` built, stage by stage."""
        for stage in self.stages.children():
            yield from stage.children()

    def run_unit(self, unit: nn.Module, *inputs: Tensor, **options: Any) -> Any:
        """A unit that is no coupling: stored, on the host where all is, or recomputed in the backward."""
        stored = self.activations in ("stored", "offloaded")
        if torch.is_grad_enabled() and (self.activations == "checkpointed" or (self.recomputes_units and not stored)):
            if torch.compiler.is_compiling():
                # A graph repeats no draws and updates statistics once by itself.
                return checkpoint(unit, *inputs, use_reentrant=False, **options)
            return replayed_checkpoint(unit, *inputs, **options)
        with offloaded(unit) if self.activations == "offloaded" else contextlib.nullcontext():
            return unit(*inputs, **options)
