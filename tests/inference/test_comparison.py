"""What is said of a sweep follows from its rows: rates are chosen, seeds paired, intervals Student's."""

import math

import pytest

from mamba3_jax.evaluate import comparison, equal


def row(variant, seed, rate, last, loss=1.0):
    return {
        "variant": variant,
        "seed": seed,
        "learning_rate": rate,
        "loss": loss,
        "scores": [{"length": 8, "scaled_last": last}],
    }


ROWS = [
    row("a", 0, 1e-3, 0.5),
    row("a", 1, 1e-3, 0.7),
    row("a", 0, 1e-2, 1.0),
    row("a", 1, 1e-2, None),  # it diverged
    row("b", 1, 1e-3, 0.2, loss=3.0),
    row("b", 0, 1e-3, 0.1, loss=2.0),
]


def test_the_rate_is_the_one_whose_seeds_are_best_in_the_mean():
    """One that diverged counts against its rate."""
    assert [r["scores"][0]["scaled_last"] for r in comparison.at_best_rate(ROWS[:4], "scaled_last@8")] == [0.5, 0.7]
    assert comparison.best(ROWS, "scaled_last@8") == 2
    assert comparison.best(ROWS, "loss") == 0


@pytest.mark.parametrize(
    ("wanted", "number"),
    [("worst scaled_last@8", 0.5), ("mean scaled_last@8", 0.6), ("best scaled_last@8", 0.7), ("best loss", 1.0)],
)
def test_statistics(wanted, number):
    assert comparison.statistic(ROWS[:4], wanted) == pytest.approx(number)


def test_of_a_loss_the_greatest_is_the_worst():
    assert comparison.statistic(ROWS[4:], "worst loss") == 3.0


def test_differences_are_paired_by_seed():
    """d = 0.1 - 0.5, 0.2 - 0.7: mean -0.45, sd 0.0707, 12.706 sd / sqrt(2) = 0.635. Unpaired it would be wider."""
    mean, half = comparison.difference(ROWS[4:], ROWS[:4], "scaled_last@8")
    assert (mean, half) == (pytest.approx(-0.45), pytest.approx(12.706 * 0.05, rel=1e-6))
    assert comparison.difference(ROWS[4:5], ROWS[:4], "scaled_last@8")[0] == pytest.approx(-0.5)
    assert math.isnan(comparison.difference(ROWS[4:5], ROWS[:4], "scaled_last@8")[1])


def test_a_variant_of_which_a_seed_diverged_at_every_rate_is_compared():
    """What it has is said, and what a number that is none decides is a dash."""
    some = [row(name, seed, 1e-3, 0.5, loss=seed) for name in "ab" for seed in range(4)]
    some[5] = row("b", 1, 1e-3, None, loss=None)
    *_, last = comparison.table(some, ["scaled_last@8", "loss"], "scaled_last@8").splitlines()
    assert last == "| b | 0.001 | 50.0 - 50.0 50.0 | - (sd -) | - ± - |"


def test_intervals_cover_as_many_seeds_as_there_are():
    """Against the quantiles of Student's t at 10 and 30 degrees of freedom: 2.228, 2.042."""
    for count, t in ((11, 2.228), (31, 2.042)):
        rows = [row("a", seed, 1e-3, 0.0) for seed in range(count)]
        others = [row("b", seed, 1e-3, float(seed % 2)) for seed in range(count)]
        mean, half = comparison.difference(others, rows, "scaled_last@8")
        sd = math.sqrt(count * mean * (1 - mean) / (count - 1))
        assert half == pytest.approx(t * sd / math.sqrt(count), rel=2e-3)


def test_expectations_are_held_to_what_was_found():
    expect = {"a": ("worst scaled_last@8", 0.9, 1.0), "b": ("mean loss", 2.0, 3.0), "c": ("best loss", 0.0, 1.0)}
    found = comparison.expected(ROWS, expect)
    assert [(e["variant"], e["holds"]) for e in found] == [("a", False), ("b", True)]
    assert comparison.said(found[0]) == "a: worst scaled_last@8 50.0, NOT as expected: 90.0 .. 100.0"
    assert comparison.said(found[1]) == "b: mean loss 2.5000, as expected: 2.0000 .. 3.0000"


def test_a_difference_is_expected_of_the_first_variant():
    """b over a: -0.45, see above. Without rows of the first there is nothing to hold it to."""
    expect = {"b": ("difference scaled_last@8", -0.5, -0.4)}
    (found,) = comparison.expected(ROWS, expect, "a")
    assert found["holds"]
    assert found["found"] == pytest.approx(-0.45)
    assert comparison.said(found) == "b: difference scaled_last@8 -45.0, as expected: -50.0 .. -40.0"
    assert comparison.expected(ROWS[4:], expect, "a") == []


def line(noise: float, shift: float = 0.0) -> dict[int, list[dict]]:
    """Loss 4 - log2(size) / 8 + shift by size, whose seeds are off by multiples of `noise` with mean 0."""
    off = {seed: noise * (seed - 1.5) for seed in range(4)}
    loss = {size: 4 - math.log2(size) / 8 + shift for size in (16, 32, 64, 128)}
    return {
        size: [row("x", seed, 1e-3, 0.0, loss=number + off[seed] * (1 + size / 64)) for seed in off]
        for size, number in loss.items()
    }


def test_the_size_of_equal_loss():
    """A line a quarter of an octave's loss lower reaches the loss at 128 a quarter of an octave below it."""
    target = line(0.0)[128]
    at, low, high, side, _ = equal.equal_at(line(0.0, -1 / 32), target, "loss")
    assert (at, low, high, side) == (*[pytest.approx(128 * 2**-0.25)] * 3, "")
    at, low, high, *_ = equal.equal_at(line(0.01, -1 / 32), target, "loss")
    assert at == pytest.approx(128 * 2**-0.25)
    assert 0.1 < math.log2(high / low) < 2  # a seed moves the crossing by 8 * 0.01 * 2.7 octaves and multiples
    assert low < at < high


def test_the_interval_is_that_of_the_mean_where_seeds_shift_a_line():
    """A whole line that moves by d moves the crossing by 8 d octaves: then the jackknife is Student's interval."""
    lines, target = line(0.0, -1 / 16), line(0.0)[64]
    for rows in lines.values():
        for own in rows:
            own["loss"] += 0.002 * (own["seed"] - 1.5)
    at, low, high, *_ = equal.equal_at(lines, target, "loss")
    sd = 8 * 0.002 * math.sqrt(5 / 3)
    assert math.log2(at) == pytest.approx(5.5)
    assert math.log2(high / at) == pytest.approx(3.182 * sd / 2, rel=1e-3)
    assert math.log2(at / low) == pytest.approx(3.182 * sd / 2, rel=1e-3)


@pytest.mark.parametrize(("shift", "side", "at"), [(-1.0, "below", 16), (1.0, "above", 128)])
def test_a_loss_that_no_size_has_is_outside(shift, side, at):
    found = equal.equal_at(line(0.01, shift), line(0.0)[64], "loss")
    assert (found.side, found.at, found.high) == (side, at, math.inf)
    assert f"{side} {at}, outside" in equal.said("x", "size", "y", "loss", found)


def test_a_loss_just_past_the_last_size_may_be_at_it():
    found = equal.equal_at(line(0.01, -0.001), line(0.0)[16], "loss")
    assert (found.side, found.at, found.near) == ("below", 16, True)
    assert equal.said("x", "size", "y", "loss", found).startswith("x has the loss of y at size 16 or below,")
    assert not equal.equal_at(line(0.01, -1.0), line(0.0)[16], "loss").near


def test_a_seed_that_diverged_decides_nothing():
    lines = line(0.01, -1 / 32)
    lines[32][0]["loss"] = None
    found = equal.equal_at(lines, line(0.0)[128], "loss")
    assert math.isfinite(found.at)
    lines[32] = [own | {"loss": None} for own in lines[32]]
    assert math.isnan(equal.equal_at(lines, line(0.0)[128], "loss").at)


def test_many_seeds_of_a_loss_are_a_mean_and_a_deviation():
    rows = [row("a", seed, 1e-3, 0.5, loss=3.0 + seed / 10) for seed in range(4)]
    assert comparison.of_seeds(rows, "loss") == "3.1500 (sd 0.1291)"
    assert comparison.of_seeds(rows, "scaled_last@8") == "50.0 50.0 50.0 50.0"
    assert comparison.of_seeds(rows[:3], "loss") == "3.0000 3.1000 3.2000"


def test_the_table_has_every_seed_and_the_difference():
    lines = comparison.table(ROWS, ("scaled_last@8", "loss"), "scaled_last@8").splitlines()
    assert lines[0] == "| variant | learning rate | scaled_last@8 | loss | scaled_last@8 over a |"
    assert lines[2] == "| a | 0.001 | 50.0 70.0 | 1.0000 1.0000 |  |"
    assert lines[3] == "| b | 0.001 | 10.0 20.0 | 2.0000 3.0000 | -45.0 ± 63.5 |"


@pytest.mark.parametrize(
    ("metric", "message"),
    [("scaled_last@9", "length 9 was not scored, only 8"), ("lost", "there is no lost"), ("lost@8", "no lost, only")],
)
def test_what_no_row_has_is_named(metric, message):
    with pytest.raises(ValueError, match=message):
        comparison.value(ROWS[0], metric)
    with pytest.raises(ValueError, match="not one of worst, mean, best"):
        comparison.statistic(ROWS, metric)


def test_fewer_skipped_updates_are_better():
    """It is a count, so not in percent."""
    rows = [
        {"variant": "a", "seed": 0, "learning_rate": rate, "skipped": count} for rate, count in ((0.1, 3), (0.2, 1))
    ]
    assert comparison.best(rows, "skipped") == 1
    assert comparison.table(rows, ["skipped"], "skipped").splitlines()[-1] == "| a | 0.2 | 1.0000 |"
