"""Curves as text: what stands where."""

from stentor.capacity import Setup, fitted
from stentor.capacity.chart import HEIGHT, chart
from stentor.capacity.plot import curves, text

SETUP = Setup(rate=500, service=fitted(0.02, 1), concurrency=16)


def test_curves_marks_and_axes_stand_where_they_belong() -> None:
    rates = [0.0, 50.0, 100.0]
    rows = chart(
        rates, {"low": [0.01, 0.01, 0.01], "high": [0.1, 0.1, 1.0]}, {"┊": 50.0}, {"◆": (100.0, 1.0)}, most=100.0,
        width=60,
    ).splitlines()  # fmt: skip
    assert len(rows) == HEIGHT + 2
    assert max(map(len, rows)) <= 60
    shown = {row[:7].strip(): n for n, row in enumerate(rows) if "┤" in row}
    assert list(shown) == ["1 s", "500 ms", "200 ms", "100 ms", "50 ms", "20 ms", "10 ms"]
    assert rows[shown["1 s"]].endswith("◆ high"), "the highest rate is at the end"
    assert rows[shown["10 ms"]].endswith(" low")
    axis = rows[HEIGHT].index("└")
    assert all(row[axis + 1 + 22] == "┊" or ord(row[axis + 1 + 22]) > 0x2800 for row in rows[:HEIGHT])
    assert rows[HEIGHT + 1].split() == ["0", "20/s", "40/s", "60/s", "80/s", "100/s"]


def test_a_line_is_one_line() -> None:
    """Each column of points between the first and the last has one, however steep the curve."""
    rows = chart([0.0, 99.0, 100.0], {"x": [0.001, 0.001, 10.0]}, {}, {}, most=100.0, width=60).splitlines()
    axis = rows[HEIGHT].index("└")
    area = [row[axis + 1 : axis + 46].ljust(45) for row in rows[:HEIGHT]]
    assert all(any(ord(row[column]) > 0x2800 for row in area) for column in range(45))
    assert all(any(ord(char) > 0x2800 for char in row) for row in area), "and no row is left out on its way up"


def test_each_curve_has_its_colour() -> None:
    painted = text(SETUP, 72, lambda name, shown: f"<{name}>" if shown == name else shown)
    assert [f"<{name}>" in painted for name in ("p50", "p95", "p99")] == [True] * 3


def test_the_knee_is_where_p99_is_twice_what_it_is_without_load() -> None:
    found = curves(SETUP)
    assert found.knee is not None
    rate, p99 = found.knee
    assert 700 < rate < 800
    assert p99 == 2 * found.lines["p99"][0]
    assert curves(Setup(rate=1, service=[0.02], concurrency=400)).knee is None


def test_a_load_beyond_the_limit_is_in_the_picture() -> None:
    shown = text(Setup(rate=1200, service=[0.02], concurrency=16), 72)
    assert "┊ λ now: 1,200/s   │ limit: 800/s, handlers" in shown
    [row] = [row for row in shown.splitlines() if "┤" in row][:1]
    assert row.index("│") < row.index("┊")
