"""A CUDA graph's behaviour on the CPU: the operations of a step are written down with their tensors, and replayed.

What Python decided in between is decided for good, a replay writes to the tensors of the capture, and reads those that
it read. The capture itself leaves everything as it was, as on a GPU, where it runs nothing. Random draws come from the
generator that was current, and move it on. Where CUDA would have to wait for the device, the tape refuses.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
# Their schemas do not say that they write the running statistics.
UPDATES_STATISTICS = ("native_batch_norm",)


class Entry(NamedTuple):
    func: Any
    args: Any
    kwargs: dict[str, Any]
    # Those of its results that lie in storages of their own.
    made: list[tuple[int, Tensor]]
    generator: torch.Generator | None


class Tape(TorchDispatchMode):
    def __init__(self, generators: "CpuGraphs") -> None:
        super().__init__()
        self._generators = generators
        self._entries: list[Entry] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if set(WAITS) & set(func.tags) and not _is_indexed_by_numbers(func, args):
            raise RuntimeError(f"{func} is not permitted when stream is capturing")
        for tensor in written(func, args, kwargs):
            self._remember(tensor)
        given = {_address(t) for t in tensors_of((args, kwargs))}
        out = func(*args, **kwargs)
        made = [(i, t) for i, t in enumerate(tensors_of(out)) if _address(t) not in given]
        self._made.update(_address(t) for _, t in made)
        if made or written(func, args, kwargs):
            self._entries.append(Entry(func, args, kwargs, made, self._generators.current))
        return out

    def _remember(self, tensor: Tensor) -> None:
        """The contents that a tensor from outside had before the capture."""
        address = _address(tensor)
        if address not in self._made and address not in self._before:
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            self._before[address] = whole, whole.clone()

    def undo(self) -> None:
        for whole, contents in self._before.values():
            whole.copy_(contents)
        self._before.clear()

    def replay(self) -> None:
        with torch.no_grad():
            for entry in self._entries:
                with self._generators.as_global(entry.generator):
                    out = tensors_of(entry.func(*entry.args, **entry.kwargs))
                for index, tensor in entry.made:
                    tensor.detach().copy_(out[index])


class CpuGraphs:
    """What `revnet_core.graphs.Graphs` asks for. `alike`: whether the states given out together are equal."""

    def __init__(self, device: torch.device, alike: bool = True) -> None:
        assert device.type == "cpu"
        self._alike = alike
        self.current: torch.Generator | None = None
        self.captures = 0

    def equal_states(self, count: int) -> list[torch.Generator]:
        seed = int(torch.randint(2**62, ()))
        return [torch.Generator().manual_seed(seed + (0 if self._alike else i)) for i in range(count)]

    @contextlib.contextmanager
    def drawing_from(self, state: torch.Generator) -> Iterator[None]:
        before, self.current = self.current, state
        try:
            with self.as_global(state):
                yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def as_global(self, state: torch.Generator | None) -> Iterator[None]:
        if state is None:
            yield
            return
        own = torch.get_rng_state()
        torch.set_rng_state(state.get_state())
        try:
            yield
        finally:
            state.set_state(torch.get_rng_state())
            torch.set_rng_state(own)

    def eagerly(self, step: Callable[[], Tensor]) -> Tensor:
        return step()

    def capture(self, step: Callable[[], None]) -> Tape:
        self.captures += 1
        tape = Tape(self)
        own = torch.get_rng_state()
        with tape:
            step()
        torch.set_rng_state(own)
        tape.undo()
        return tape

    def host_flag(self) -> Tensor:
        return torch.zeros((), dtype=torch.bool)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    named = zip(func._schema.arguments, args, strict=False)
    given = [(a, v) for a, v in named] + [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
    hidden = ("running_mean", "running_var") if func.overloadpacket.__name__ in UPDATES_STATISTICS else ()
    written: Iterable[Any] = (
        value for a, value in given if a.name in hidden or (a.alias_info is not None and a.alias_info.is_write)
    )
    return tensors_of(list(written))


def _is_indexed_by_numbers(func: Any, args: Any) -> bool:
    return func.overloadpacket.__name__ == "index" and all(t.dtype == torch.int64 for t in tensors_of(args[1]))
