"""Numbers are written alike everywhere, and none says what it does not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.statistics import corrected
from holdfast.wording import (
    NOTHING,
    duration,
    logits,
    norm,
    norm_range,
    p_value,
    p_values,
    percent,
    percent_range,
    plain,
    points,
    power,
    ratio,
    times,
)

NUMBERS: tuple[Callable[[float | None], str], ...] = (percent, norm, power, logits, points)
SUPERSCRIPT = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
finite = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12)


def read(text: str) -> float:
    """The number that a text stands for."""
    text = text.replace("−", "-")
    if "×10" in text:
        mantissa, _, exponent = text.partition("×10")
        return float(f"{mantissa}e{exponent.translate(SUPERSCRIPT)}")
    return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)


@given(st.sampled_from(NUMBERS), finite)
def test_no_minus_zero_no_exponent_and_a_minus_sign(
    write: Callable[[float | None], str], value: float
) -> None:
    text = write(value)
    assert "e" not in text and "-" not in text and "nan" not in text
    assert not re.fullmatch(r"−[<>≈0.%]*", text) and "−<" not in text
    assert text.count("−") == (1 if text.startswith("−") else 0) and " " not in text
    if text.startswith("−"):
        assert value < 0


@pytest.mark.parametrize("write", NUMBERS)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_what_was_not_measured_is_a_dash(
    write: Callable[[float | None], str], value: float | None
) -> None:
    assert write(value) == NOTHING


@given(finite.filter(lambda x: abs(x) > 1e-300))
def test_three_digits_lose_less_than_half_of_a_hundredth(value: float) -> None:
    """Numbers as powers of ten have two digits."""
    text = power(value)
    assert abs(read(text) - value) <= (0.05 if "×" in text else 0.005) * abs(value) * (1 + 1e-9)


@given(st.floats(0, 1))
def test_a_share_is_all_or_nothing_only_where_it_is(value: float) -> None:
    text = percent(value)
    assert (text == "0%") == (value == 0) and (text == "100%") == (value == 1)
    if text[0] not in "<>":
        assert abs(read(text) - value) <= 0.005 + 1e-9


@given(st.floats(-0.00499, -1e-300))
def test_a_little_below_nothing_is_about_nothing(value: float) -> None:
    assert percent(value) == "≈0%" and points(value / 10) == "0"


@given(finite, finite)
def test_an_interval_is_made_of_its_ends(low: float, high: float) -> None:
    text = percent_range(low, high)
    assert text == ("" if low == high else f"[{percent(low)}, {percent(high)}]")
    assert percent_range(None, high) == percent_range(low, math.nan) == ""


def test_some_numbers_as_they_are_written() -> None:
    assert [power(x) for x in (0.0, 0.154, 2.62e-8, 7.9e6, 1234.0, 9999.9, -1.3e-9, 62.55)] == [
        "0", "0.154", "2.6×10⁻⁸", "7.9×10⁶", "1230", "1.0×10⁴", "−1.3×10⁻⁹", "62.5",
    ]  # fmt: skip
    assert [percent(x) for x in (0.0, 0.001, 0.768, 0.999, 1.0, 1.4, -0.07)] == [
        "0%", "<1%", "77%", ">99%", "100%", "140%", "−7%",
    ]  # fmt: skip
    assert [logits(x) for x in (-0.001, -0.005, -1.144)] == ["0.00", "−0.01", "−1.14"]
    assert [norm(x) for x in (0.0, 1e-5, 0.4551)] == ["0.000", "<0.001", "0.455"]
    assert [points(x) for x in (0.05, -0.031, 0.0)] == ["+5", "−3", "0"]
    assert points(0.3044, 1) == "+30.4" and points(-0.0001, 1) == "0.0"
    assert norm_range(0.1, None) == norm_range(0.1, math.inf) == "[0.100, ∞]"
    assert [plain(x) for x in (-10.0, 0.25, [1], "mean", True)] == [
        "−10", "0.25", "[1]", "mean", "True",
    ]  # fmt: skip
    assert [times(x) for x in (None, math.inf, 0.0, 1.284)] == ["∞", "∞", "0", "1.28"]
    assert [duration(x) for x in (4.2, 600, 7200)] == ["4.2 s", "10.0 min", "2.0 h"]


def test_a_ratio_of_costs() -> None:
    base = {"ratio": 2.0, "low": 1.5, "high": None, "share_dearer": 1.0, "n_clusters": 9}
    assert ratio(base) == "2.00× [1.50, ∞]"
    assert ratio(base | {"ratio": None, "low": None}) == "∞"
    assert ratio(base | {"share_dearer": None}) == NOTHING


def test_p_values_only_where_they_could_have_told() -> None:
    few, _, none = corrected([2 / 2**6, 1.0, math.nan], [6, 6, 0])
    (one,) = corrected([1.0], [20])
    assert p_value(few) == p_values(few) == "too few prompts to tell (n = 6)"
    assert p_value(one) == "1" and p_values(one) == "1 (1)"
    assert p_value(none) == p_value(None) == NOTHING
    (alone,) = corrected([2 / 2**6], [6])
    assert p_value(alone) == "0.031", "by itself six that all disagree tell"
    (small,) = corrected([1e-9], [40])
    assert p_value(small) == "<0.001"
