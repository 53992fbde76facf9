"""``stentor choose`` as people use it."""

import json

import pytest

from tests.cli.conftest import Stentor


def test_it_chooses_from_what_is_shipped(shop: Stentor) -> None:
    text = shop("choose", "--need", "hosts", "--rate", "1k/s", "--weight", "fault-tolerance=3")
    assert "as measured 2026-" in text
    assert "because it does not do" in text
    found = json.loads(shop("choose", "--need", "hosts", "--have", "postgresql", "--price", "redis=3", "--json"))
    assert found["failed"] == {"sqlite": ["hosts"]}
    assert {place["broker"] for place in found["places"]} >= {"redis", "kafka"}
    assert found["measured"]["command"].startswith("stentor bench")
    assert "none of them does all that is needed" in shop("choose", "--rate", "1m/s")


@pytest.mark.parametrize(
    ("args", "code", "wrong"),
    [
        (("--need", "speed"), 2, "'speed' is not one of"),
        (("--weight", "cost"), 2, "'cost' is no NAME=NUMBER"),
        (("--weight", "looks=2"), 3, "there is no criterion 'looks'"),
        (("--bench", "none.json"), 3, "none.json is no report of `stentor bench --json`"),
    ],
)
def test_bad_input_gets_one_clear_line(shop: Stentor, args: tuple[str, ...], code: int, wrong: str) -> None:
    text = shop("choose", *args, code=code)
    assert wrong in " ".join(text.split())
    assert "Traceback" not in text
