"""Axes: what the dimensions of a forward's tensors are made of.  They are joined, split and frozen, never undone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Axis:
    """Channels that are permuted as one.  Joined axes have a common root; a split one consists of parts."""

    __slots__ = ("frozen", "parts", "parent", "size")

    def __init__(self, size: int, frozen: str | None = None) -> None:
        self.size = size
        self.frozen = frozen
        self.parent: Axis | None = None
        self.parts: tuple[Axis, Axis] | None = None

    def root(self) -> Axis:
        axis = self
        while axis.parent is not None:
            axis = axis.parent
        return axis

    def leaves(self) -> list[Axis]:
        """Outermost first."""
        root = self.root()
        return [root] if root.parts is None else root.parts[0].leaves() + root.parts[1].leaves()


Dimension = tuple[Axis, ...]
Label = tuple[Dimension, ...]  # one entry per dimension of the tensor; a dimension of size 1 is ()


def leaves(dimension: Iterable[Axis]) -> list[Axis]:
    return [leaf for axis in dimension for leaf in axis.leaves()]


def freeze(dimension: Iterable[Axis], why: str) -> None:
    for leaf in leaves(dimension):
        leaf.frozen = leaf.frozen or why


def join(one: Iterable[Axis], other: Iterable[Axis]) -> None:
    """Make two dimensions of the same size one, splitting axes where their borders differ."""
    a, b = leaves(one), leaves(other)
    while a and b:
        x, y = a.pop(0), b.pop(0)
        if x is y:
            continue
        if x.size == y.size:
            y.parent = x
            x.frozen = x.frozen or y.frozen
        elif x.size > y.size and x.size % y.size == 0:
            outer, inner = split(x, y.size)
            a[:0], b[:0] = [outer, inner], [y]
        elif x.size < y.size and y.size % x.size == 0:
            outer, inner = split(y, x.size)
            a[:0], b[:0] = [x], [outer, inner]
        else:
            return freeze([x, y, *a, *b], "seen in two ways that do not line up")


def split(axis: Axis, outer: int) -> tuple[Axis, Axis]:
    axis.parts = (Axis(outer, axis.frozen), Axis(axis.size // outer, axis.frozen))
    return axis.parts


def outer_part(dimension: Dimension, outer: int) -> tuple[Dimension, Dimension] | None:
    """(outer axes of that many entries, the inner rest); None where no axis ends or can be split there."""
    left, taken, have = leaves(dimension), [], 1
    while have < outer:
        axis, need = left.pop(0), outer // have
        if outer % have == 0 and need % axis.size == 0:
            taken.append(axis)
            have *= axis.size
        elif outer % have == 0 and axis.size % need == 0:
            first, second = split(axis, need)
            return (*taken, first), (second, *left)
        else:
            return None
    return tuple(taken), tuple(left)


def fresh(shape: Sequence[int], why: str | None) -> Label:
    return tuple((Axis(n, why),) if n > 1 else () for n in shape)
