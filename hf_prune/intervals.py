"""How sure a figure is that was measured on a sample of images: intervals and paired tests. All hold 95 %."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

DRAWS = 2000  # bootstrap resamples


def wilson(hits: int, count: int) -> list[float]:
    """Interval of a share (Wilson 1927): never outside 0 and 1, and not empty at 0 or 1."""
    z = 1.959963984540054
    share, square = hits / count, z * z / count
    middle = (share + square / 2) / (1 + square)
    reach = z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return [max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))]  # rounding must not exclude it


def percent(scores: Mapping[str, Any], key: str) -> str:
    """A share of an evaluation, and its interval where one was measured: "61.2 % [57.8, 64.5]"."""
    interval = scores.get(f"{key}_interval")
    around = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return f"{100 * scores[key]:.1f} %{around}"


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p of McNemar's test: images only dense gets right (lost), images only pruned gets right (won)."""
    count, less = lost + won, min(lost, won)
    log = [math.lgamma(count + 1) - math.lgamma(i + 1) - math.lgamma(count - i + 1) for i in range(less + 1)]
    return min(1.0, 2 * sum(math.exp(each - count * math.log(2)) for each in log))


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], count: int, seed: int) -> list[float]:
    """Percentile interval over resampled images; statistic takes indices (draws, count)."""
    random = np.random.default_rng(seed)
    size = max(1, min(DRAWS, 2_000_000 // count))  # a bounded table of indices, whatever the number of images
    drawn = [statistic(random.integers(0, count, (min(size, DRAWS - start), count))) for start in range(0, DRAWS, size)]
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return [float(low), float(high)]
