"""Figures of a step over depth and batch size, from a few points of it.

Every allocation of a step is an affine function of the batch size, and each unit more in every stage adds the same
ones. So saved bytes are affine in either, and a peak, the highest of many moments, is convex in either. Such a function
lies nowhere above the surface that its values at a rectangle's corners span; and if it meets that surface at one point
within, it meets it everywhere: a convex function that meets its chord between the ends meets it all along, first on the
line through the point, then at that line's ends, then on the lines through these. Hence five predictions tell all of a
rectangle of depths and batch sizes, or else that it has to be divided. Of a peak this is asked in each part of the
model by itself, where it has fewer moments to be at, and only of the parts that are the highest somewhere.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

from harness.measure.live import Phase

# Where a CPU's kernels change with the batch size, so that a rectangle that does not fit is best divided.
KERNELS_CHANGE = 16
# How far, in relation, a figure may lie from the surface that it is taken to lie on.
TOLERANCE = 1e-3

# Depth and batch size.
Point = tuple[int, int]


class Figures(NamedTuple):
    """`form` says what the numbers are of; only those of one form can be compared."""

    form: tuple[tuple[Phase, str], ...]
    numbers: tuple[int, ...]


class Surface:
    """Figures over depth and batch size, as many of them predicted as it takes."""

    def __init__(self, at: Callable[[Point], Figures]) -> None:
        self.known: dict[Point, Figures] = {}
        self._at = at

    def value(self, point: Point) -> Figures:
        if point not in self.known:
            self.known[point] = self._at(point)
        return self.known[point]

    def fill(self, depths: Sequence[int], sizes: Sequence[int]) -> None:
        """Find the figures of all points of a rectangle; both axes ascending."""
        if len(depths) == 2 or len(sizes) == 2:  # such an axis has no point within
            for part_of_depths, part_of_sizes in _divided(depths, sizes, lines=True):
                self.fill(part_of_depths, part_of_sizes)
            return
        # The cheapest first: what cannot be predicted at all fails there.
        corners = [[self.value((depth, size)) for size in (sizes[0], sizes[-1])] for depth in (depths[0], depths[-1])]
        inside = depths[len(depths) > 2], sizes[len(sizes) > 2]
        if len({self.value(inside).form, *(corner.form for row in corners for corner in row)}) == 1:
            spanned = Spanned(depths, sizes, corners)
            surface = {(depth, size): spanned((depth, size)) for depth in depths for size in sizes}
            if _near(self.value(inside), surface[inside], _that_matter(list(surface.values()))):
                self.known = surface | self.known
                return
        for part_of_depths, part_of_sizes in _divided(depths, sizes, lines=False):
            self.fill(part_of_depths, part_of_sizes)


class Spanned:
    """The surface that four corners span: affine in either coordinate."""

    def __init__(self, depths: Sequence[int], sizes: Sequence[int], corners: list[list[Figures]]) -> None:
        self._axes = depths, sizes
        self._corners = corners

    def __call__(self, point: Point) -> Figures:
        rows = [_between(row[0].numbers, row[1].numbers, self._share(point, 1)) for row in self._corners]
        numbers = _between(rows[0], rows[1], self._share(point, 0))
        return Figures(self._corners[0][0].form, tuple(map(round, numbers)))

    def _share(self, point: Point, axis: int) -> Fraction:
        low, high = self._axes[axis][0], self._axes[axis][-1]
        return Fraction(0) if low == high else Fraction(point[axis] - low, high - low)


def _between(first: Sequence[Fraction | int], second: Sequence[Fraction | int], share: Fraction) -> list[Fraction]:
    return [a + (b - a) * share for a, b in zip(first, second, strict=True)]


def _near(figures: Figures, others: Figures, positions: Iterable[int]) -> bool:
    pairs = ((figures.numbers[i], others.numbers[i]) for i in positions)
    return all(abs(a - b) <= TOLERANCE * abs(a) for a, b in pairs)


def _that_matter(surface: Sequence[Figures]) -> set[int]:
    """Positions of all figures but the peaks that are highest nowhere, be it with or without the buffers that an engine
    adds in the backward."""
    form = surface[0].form
    first_peak = len(surface[0].numbers) - len(form)
    peaks = range(first_peak, len(surface[0].numbers))
    backward = [i for i in peaks if form[i - first_peak][0] == "backward"]
    matter = set(range(first_peak))
    for figures in surface:
        matter |= {max(kind, key=lambda i: figures.numbers[i]) for kind in (peaks, backward) if kind}
    return matter


def _divided(
    depths: Sequence[int], sizes: Sequence[int], *, lines: bool
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """The rectangle in parts: an axis of two points into single ones; else where kernels change, or in the middle."""
    if lines:
        for depth_part in [[d] for d in depths] if len(depths) == 2 else [depths]:
            for size_part in [[s] for s in sizes] if len(sizes) == 2 else [sizes]:
                yield depth_part, size_part
    elif sizes[0] < KERNELS_CHANGE <= sizes[-1]:
        yield depths, [size for size in sizes if size < KERNELS_CHANGE]
        yield depths, [size for size in sizes if size >= KERNELS_CHANGE]
    else:
        for depth_part in _halves(depths):
            for size_part in _halves(sizes):
                yield depth_part, size_part


def _halves(axis: Sequence[int]) -> list[Sequence[int]]:
    middle = len(axis) // 2
    return [axis] if len(axis) == 1 else [axis[: middle + 1], axis[middle:]]
