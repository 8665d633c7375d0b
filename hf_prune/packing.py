"""Tensors that follow n:m, smaller: n values per group of m, and where they stand.  Exact to the last bit.

The groups lie along input channels: the last axis of a Linear's weight (out, in), the second of a convolution's
(out, in, kh, kw), which is stored as (out, kh, kw, in). Per group the n values keep their order, and one field of 1, 2,
4, 8 or 16 bits says where they stand, fields filling bytes from the low end. A field holds n positions of ceil(log2 m)
bits each, the first position lowest (2:4: two positions of 2 bits), or, where that would be longer, a mask of m bits.
A group with fewer than n entries is filled up with zeros at the first free positions.

"Zero" means all bits zero: -0.0 and NaN are values like any other, so unpacking gives back every bit.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

MAX_M = 16  # a group's mask must fit a 16 bit field; m is 4 on hardware, 8 or 16 in papers
CHUNK = 1 << 14  # groups at a time: what one step touches stays in the processor's cache
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # element size -> dtype to see its bits


def check(n: int, m: int) -> None:
    """Raise ValueError unless n:m can be packed."""
    if not 0 < n < m <= MAX_M:
        raise ValueError(f"{n}:{m} cannot be packed: 0 < N < M <= {MAX_M} is needed.")


def field_bits(n: int, m: int) -> int:
    """Bits per group that say where its values stand."""
    need = min(n * (m - 1).bit_length(), m)
    return 1 << (need - 1).bit_length()


def packed_bytes(shape: tuple[int, ...], itemsize: int, n: int, m: int) -> int:
    """Bytes of values and fields of a dense tensor of `shape`, whose input channels m divides."""
    groups = torch.Size(shape).numel() // m
    return groups * n * itemsize + -(-groups * field_bits(n, m) // 8)


def pack(tensor: Tensor, n: int, m: int) -> tuple[Tensor, Tensor] | None:
    """Values and fields of a dense float tensor; None where it does not follow n:m, and has to stay dense.

    tensor: (out, in) or (out, in, *kernel), any float dtype, on the CPU.
    Returns (values (out, *kernel, in * n / m), of the tensor's dtype; fields (bytes,) uint8).
    """
    check(n, m)
    if not tensor.is_floating_point() or tensor.dim() < 2 or tensor.shape[1] % m or not tensor.numel():
        return None
    dense = tensor.detach().movedim(1, -1).contiguous()
    groups = dense.view(BITS[dense.element_size()]).view(-1, m)
    table = _tables(n, m)
    values = torch.empty((len(groups), n), dtype=groups.dtype)
    fields = torch.empty(len(groups), dtype=torch.int32)
    starts = torch.arange(min(CHUNK, len(groups)), dtype=torch.int64) * m
    for first in range(0, len(groups), CHUNK):
        chunk = groups[first : first + CHUNK]
        masks = _masks(chunk)
        found = table.fields.index_select(0, masks)
        if bool((found < 0).any()):  # more than n values in a group
            return None
        fields[first : first + CHUNK] = found
        flat, start = chunk.reshape(-1), starts[: len(chunk)]
        for k, positions in enumerate(table.positions_of_mask):
            values[first : first + CHUNK, k] = flat.index_select(0, positions.index_select(0, masks) + start)
    shape = (*dense.shape[:-1], dense.shape[-1] // m * n)
    return values.view(dense.dtype).view(shape), _to_bytes(fields, field_bits(n, m))


def unpack(values: Tensor, fields: Tensor, n: int, m: int) -> Tensor:
    """The dense tensor that `pack` took, bit for bit.

    values: (out, *kernel, in * n / m). fields: (bytes,) uint8. Both on the CPU.
    Raises ValueError for tensors that `pack` cannot have made.
    """
    check(n, m)
    if values.dim() < 2 or not values.is_floating_point() or values.shape[-1] % n or not values.numel():
        raise ValueError(f"packed values of {n}:{m} cannot have the shape {tuple(values.shape)} and {values.dtype}.")
    if fields.dtype != torch.uint8 or fields.dim() != 1:
        raise ValueError(f"packed fields must be bytes in a row, found {fields.dtype} of {tuple(fields.shape)}.")
    bits = BITS[values.element_size()]
    given = values.detach().contiguous().view(bits).view(-1, n)
    width = field_bits(n, m)
    if fields.numel() != -(-len(given) * width // 8):
        raise ValueError(f"{len(given)} groups of {n}:{m} have {-(-len(given) * width // 8)} bytes of fields, found "
                         f"{fields.numel()}.")  # fmt: skip
    codes, rest = _from_bytes(fields.contiguous(), width, len(given))
    if rest:
        raise ValueError("the packed fields are damaged: bits are set behind the last group.")
    table = _tables(n, m)
    dense = torch.zeros((len(given), m), dtype=bits)
    starts = torch.arange(min(CHUNK, len(given)), dtype=torch.int64) * m
    for first in range(0, len(given), CHUNK):
        code = codes[first : first + CHUNK]
        flat, start = dense[first : first + CHUNK].view(-1), starts[: len(code)]
        if not bool(table.valid.index_select(0, code).all()):
            raise ValueError("the packed fields are damaged: a group's positions are not in order.")
        for k, positions in enumerate(table.positions_of_field):
            flat.index_copy_(0, positions.index_select(0, code) + start, given[first : first + CHUNK, k])
    shape = (*values.shape[:-1], values.shape[-1] // n * m)
    return dense.view(values.dtype).view(shape).movedim(-1, 1).contiguous()


class _Tables:
    """What a group's mask (m bits) says, and what its field says, looked up instead of computed."""

    fields: Tensor  # (2^m,) int32: mask -> field; -1 for more than n entries
    positions_of_mask: list[Tensor]  # n times (2^m,) int64: mask -> position of the k-th value
    positions_of_field: list[Tensor]  # n times (2^width,) int64
    valid: Tensor  # (2^width,) bool: fields that `pack` writes

    def __init__(self, n: int, m: int) -> None:
        digits = (m - 1).bit_length()
        by_position = n * digits <= m
        chosen = torch.tensor(list(itertools.combinations(range(m), n)), dtype=torch.int64)  # (masks with n ones, n)
        mask = (1 << chosen).sum(1)
        field = (chosen << digits * torch.arange(n)).sum(1) if by_position else mask
        size = 1 << field_bits(n, m)
        self.valid = torch.zeros(size, dtype=torch.bool).index_fill_(0, field, True)
        of_field = torch.zeros((n, size), dtype=torch.int64)
        of_field[:, field] = chosen.T
        self.positions_of_field = list(of_field.unbind())
        # masks with fewer ones mean the mask that is filled up at the first free positions
        every = torch.arange(1 << m)
        ones = (every[:, None] >> torch.arange(m) & 1).bool()  # (2^m, m)
        free = ~ones & ((~ones).cumsum(1) <= n - ones.sum(1, keepdim=True))
        full = ((ones | free).long() << torch.arange(m)).sum(1)
        of_mask = torch.full((1 << m,), -1, dtype=torch.int32)
        of_mask[mask] = field.int()
        fits = ones.sum(1) <= n
        self.fields = torch.where(fits, of_mask[full], -1)
        positions = torch.zeros((n, 1 << m), dtype=torch.int64)
        positions[:, mask] = chosen.T
        self.positions_of_mask = list(torch.where(fits, positions[:, full], 0).unbind())


@lru_cache(maxsize=8)
def _tables(n: int, m: int) -> _Tables:
    with torch.device("cpu"):  # they are kept: a caller's default device must not be kept with them
        return _Tables(n, m)


def _masks(groups: Tensor) -> Tensor:
    """groups (g, m) -> (g,) int32: bit j is set where entry j is not zero."""
    there = groups != 0
    m = groups.shape[1]
    if m == 4:  # four flags are one 32 bit word, and a product gathers their bits at its top
        return ((there.view(torch.int32).view(-1) * 0x10204080) >> 28) & 15
    masks = torch.zeros(len(groups), dtype=torch.int32)
    for j in range(m):
        masks |= there[:, j].int() << j
    return masks


def _to_bytes(fields: Tensor, width: int) -> Tensor:
    """(g,) int32 of `width` bits each -> bytes, low end first."""
    if width == 16:
        return fields.to(torch.int16).view(torch.uint8)
    per_byte = 8 // width
    fields = torch.nn.functional.pad(fields.to(torch.uint8), (0, -len(fields) % per_byte)).view(-1, per_byte)
    packed = fields[:, 0].clone()
    for k in range(1, per_byte):
        packed |= fields[:, k] << k * width
    return packed


def _from_bytes(packed: Tensor, width: int, count: int) -> tuple[Tensor, bool]:
    """(`count` fields as int32, whether there is anything but zeros behind them)."""
    if width == 16:
        return packed.view(torch.int16).int() & 0xFFFF, False
    per_byte = 8 // width
    fields = torch.stack([packed >> k * width & (1 << width) - 1 for k in range(per_byte)], 1).view(-1)
    return fields[:count].int(), bool(fields[count:].any())
