"""Which weights each 2:4 kernel can take, from its shape alone.  Nothing here says that it is faster.

cuSPARSELt and CUTLASS are the two behind `torch.sparse.to_sparse_semi_structured`: linear layers on NVIDIA GPUs from
compute capability 8.0 on.  Their limits are torch's own, for float16 and bfloat16 (a test compares them).  TensorRT's
are those of NVIDIA's ASP, whose masks it was made for; it takes convolutions too.
"""

from __future__ import annotations

NAMES = ("cuSPARSELt", "CUTLASS", "TensorRT")
LIMITS = {"cuSPARSELt": (16, 16), "CUTLASS": (32, 64), "TensorRT": (8, 16)}  # multiples of (out, in)
CAPABILITY = (8, 0)  # of the GPU


def refusal(backend: str, shape: tuple[int, ...], pattern: str | None, *, convolution: bool, whole: bool) -> str | None:
    """Why `backend` cannot take a weight as 2:4; None if it can.

    shape: of the parameter, (out, in) or (out, in / groups, *kernel).  pattern: as in the plan, None where dense.
    convolution: it is one.  whole: one product reads the whole parameter with its rows as outputs.
    """
    rows, columns = LIMITS[backend]
    if pattern != "2:4":
        return "dense" if pattern is None else f"{pattern} is not 2:4"
    if convolution and backend != "TensorRT":
        return "linear layers only"
    if not whole:
        return "part of a weight, or stored the other way round"
    if shape[0] % rows or shape[1] % columns:
        return f"needs multiples of {rows} x {columns}, found {shape[0]} x {shape[1]}"
    return None
