"""Arrays as JSON for the page: base64 of 16-bit integers. page/data.js unpacks them.

A float becomes one of 65,535 equally spaced numbers between the smallest and the largest, so it is off by at most
(high − low) / 131,068.
"""

import base64
from typing import Any

import numpy as np

NAN = 65_535  # the step that stands for nan


def pack_integers(values: np.ndarray) -> dict[str, Any]:
    """Integers ≥ 0 in 16 bits if all fit, otherwise in 32."""
    bits = 16 if values.max(initial=0) < 1 << 16 else 32
    return {"bits": bits, "data": base64.b64encode(values.astype(f"<u{bits // 8}").tobytes()).decode()}


def pack_numbers(values: np.ndarray) -> dict[str, Any]:
    """Floats, finite or nan."""
    known = values[~np.isnan(values)].astype(np.float64)
    low, high = float(known.min(initial=np.inf)), float(known.max(initial=-np.inf))
    low, high = (low, high) if low <= high else (0.0, 0.0)
    steps = np.full(values.shape, NAN, dtype=np.int64)
    steps[~np.isnan(values)] = np.rint((known - low) / ((high - low) or 1.0) * (NAN - 1)).astype(np.int64)
    return {"low": low, "high": high, **pack_integers(steps)}
