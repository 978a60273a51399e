"""Write means with 95% intervals by Student's t."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

#: The 97.5% quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the normal's.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the mean's interval; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    quantile = _T[len(values) - 2] if len(values) - 2 < len(_T) else 1.96
    return quantile * stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float], format: str = ".3f") -> str:
    """Return ``mean ± half the width``, or the value alone where there is one."""
    if len(values) == 1:
        return f"{values[0]:{format}}"
    return f"{fmean(values):{format}} ± {half_width(values):{format}}"
