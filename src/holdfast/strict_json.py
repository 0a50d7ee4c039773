"""JSON as a run's folder holds it: NaN becomes null, and every number is one.

What is hashed is written by `canonical.py`.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np


def json_safe(value: Any, path: str = "$") -> Any:
    """`value` as plain JSON: NaN (not scored) becomes None, tuples and arrays become lists.

    Numpy's numbers become Python's. Raises ValueError for an infinity, which is neither a
    measurement nor "not scored", and TypeError for what JSON cannot hold, naming the path.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{path} has the key {key!r}: expected str")
        return {str(key): json_safe(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        if math.isinf(value):
            raise ValueError(f"{path} is {value!r}: expected a finite number or NaN (not scored)")
        return None if math.isnan(value) else float(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{path} is a {type(value).__name__}, which JSON cannot hold")


def dump(value: dict[str, Any]) -> bytes:
    """Of what is JSON safe, for people to read too."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def parse(data: bytes) -> Any:
    """JSON, strictly: NaN and infinities, which Python would take or make, raise ValueError."""

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"{number} is not a finite number")
        return value

    return json.loads(data, parse_constant=finite, parse_float=finite)
