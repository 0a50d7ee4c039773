"""How numbers and names are written: on the page, in the picture, in verdicts, in the terminal.

Every function takes None or NaN for "not measured". Nothing is written with a minus zero, as 0 or
100 percent where it is not, or with an exponent as a computer has it; a minus is a minus sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, isnan
from typing import Any, TypeGuard

from holdfast.statistics import Corrected

NOTHING = "–"
MINUS = "−"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

ARMS = {
    "none": "right answer",
    "wrong_target": "wrong target",
    "no_clamp": "no clamp",
    "ignorant": "ignorant twin",
    "random_features": "random features",
}


def arm_name(kind: str) -> str:
    """A control as readers are told of it; the audit itself is the right answer."""
    return ARMS.get(kind, kind.replace("_", " "))


# --- Single numbers -------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """A share as a percentage: 0.768 → 77%. Never rounds to 0% or 100% what is not."""
    if not _measured(value):
        return NOTHING
    if value and abs(value) < 0.005:
        # "−<1%" can be read by nobody: what is just below nothing is about nothing.
        return "<1%" if value > 0 else "≈0%"
    return ">99%" if 0.995 <= value < 1 else _minus(f"{value:.0%}")


def norm(value: float | None) -> str:
    """A norm relative to the residual's, in thousandths."""
    if not _measured(value) or abs(value) >= 10:
        return power(value)
    return "<0.001" if 0 < value < 0.0005 else _minus(f"{value:.3f}")


def power(value: float | None) -> str:
    """Three digits, and small and large numbers as 1.2×10⁻⁸."""
    if not _measured(value):
        return NOTHING
    rounded = float(f"{value:.3g}")
    if rounded == 0 or 1e-3 <= abs(rounded) < 1e4:
        return _minus(f"{rounded:g}")
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return _minus(f"{mantissa}×10{superscript(int(exponent))}")


def logits(value: float | None) -> str:
    """A difference of logits, in hundredths."""
    return _minus(f"{value:.2f}") if _measured(value) else NOTHING


def coefficient(value: float | None) -> str:
    """A coefficient or a score around 0 and 1, in hundredths."""
    return logits(value)


def points(value: float | None, digits: int = 0) -> str:
    """A difference of two shares in percentage points, with its sign: +5, −3, 0."""
    if not _measured(value):
        return NOTHING
    text = f"{100 * value:+.{digits}f}"
    return _minus(text) if text.strip("+-0.") else text[1:]


def times(value: float | None) -> str:
    """A ratio of costs; None is one that is infinite, or has no end."""
    if value is None or value == float("inf"):
        return "∞"
    return NOTHING if isnan(value) else "0" if value == 0 else f"{value:.2f}"


def plain(value: Any) -> str:
    """A setting as it was chosen, numbers without needless digits: −10, 0.25."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return _minus(f"{value:g}")


def superscript(number: int) -> str:
    return str(number).translate(_SUPERSCRIPT)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# --- Intervals ------------------------------------------------------------------------------------


def percent_range(low: float | None, high: float | None) -> str:
    """An interval of shares. None has no width: a bootstrap of rows that all agree knows nothing of
    how sure it is, and says so by both ends being one."""
    return _range(percent, low, high)


def points_range(low: float | None, high: float | None) -> str:
    return _range(points, low, high)


def power_range(low: float | None, high: float | None) -> str:
    return _range(power, low, high)


def logits_range(low: float | None, high: float | None) -> str:
    return _range(logits, low, high)


def norm_range(low: float | None, high: float | None) -> str:
    """An interval of norms; without an upper end where it reaches goals never reached."""
    if not _measured(low):
        return ""
    return f"[{norm(low)}, {norm(high) if _measured(high) else '∞'}]"


def share(low: float | None, estimate: float | None, high: float | None) -> str:
    """A rate with its interval; of nothing, no interval either."""
    if not _measured(estimate):
        return NOTHING
    return f"{percent(estimate)} {percent_range(low, high)}".strip()


def cost(row: Mapping[str, Any]) -> str:
    """A search's median smallest norm, of its row of the summary: a goal never reached counts as
    infinitely far, so that there is none where half of the prompts or more were not reached."""
    if not row["n_valid"]:
        return "no prompt"
    if row["norm_relative_median"] is None:
        return "not by half"
    ends = norm_range(row["norm_relative_low"], row["norm_relative_high"])
    return f"{norm(row['norm_relative_median'])} {ends}".strip()


def ratio(separation: Mapping[str, Any]) -> str:
    """A separation's paired ratio with its interval, ∞ where the control was never forced."""
    if separation["share_dearer"] is None:
        return NOTHING
    text = times(separation["ratio"]) + ("×" if separation["ratio"] else "")
    if separation["n_clusters"] < 2 or separation["low"] == separation["high"]:
        return text
    return f"{text} [{times(separation['low'])}, {times(separation['high'])}]"


# --- Tests ----------------------------------------------------------------------------------------


def p_value(test: Corrected | None) -> str:
    """A corrected p-value; where no outcome could have made it small, why there is none."""
    if test is None or isnan(test.p):
        return NOTHING
    return _small(test.adjusted) if test.tells else too_few(test.n_units)


def p_values(test: Corrected | None) -> str:
    """A p-value and, in brackets, the corrected one."""
    if test is None or isnan(test.p) or not test.tells:
        return p_value(test)
    return f"{_small(test.p)} ({_small(test.adjusted)})"


def too_few(n: int) -> str:
    return f"too few prompts to tell (n = {n})"


def _small(p: float) -> str:
    return "<0.001" if p < 0.001 else ">0.999" if 0.9995 <= p < 1 else f"{p:.3f}" if p < 1 else "1"


# --- Parts ----------------------------------------------------------------------------------------


def _measured(value: float | None) -> TypeGuard[float]:
    return value is not None and isfinite(value)


def _minus(text: str) -> str:
    """A number's text with a minus sign for a hyphen, and none before a zero."""
    if text.startswith("-") and not text.strip("-0.%"):
        text = text[1:]
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


def _range(written: Any, low: float | None, high: float | None) -> str:
    if not _measured(low) or not _measured(high) or low == high:
        return ""
    return f"[{written(low)}, {written(high)}]"
