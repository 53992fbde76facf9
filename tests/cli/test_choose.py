"""``stentor choose`` as people use it."""

import json
import re

import pytest

from stentor.bench.choose import shipped
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


def test_it_says_who_does_what_is_needed_and_what_was_measured(shop: Stentor) -> None:
    text = shop("choose", "--need", "order", "--need", "skills", "--have", "redis", "--have", "sqlite")
    assert re.search(r"^broker +order +skills$", text, re.MULTILINE)
    assert re.search(r"^redis +yes +yes$", text, re.MULTILINE)
    assert re.search(r"^kafka +yes +no$", text, re.MULTILINE)
    text = shop("choose")
    assert re.search(r"^redis +Redis 7\S+ ", text, re.MULTILINE)
    for name in (one.broker for one in shipped().brokers if not re.search(r"\d", one.server)):
        assert re.search(rf"^{name} +unknown ", text, re.MULTILINE)
    assert re.search(r"cannot be told apart, as their ranges meet: .*\w and \w", text)


@pytest.mark.parametrize(
    ("args", "code", "wrong"),
    [
        (("--need", "speed"), 2, "'speed' is not one of"),
        (("--need", "skills"), 3, "the need of skills asks for --have NAME"),
        (("--weight", "cost"), 2, "'cost' is no NAME=NUMBER"),
        (("--weight", "looks=2"), 3, "there is no criterion 'looks'"),
        (("--bench", "none.json"), 3, "none.json is no report of `stentor bench --json`"),
    ],
)
def test_bad_input_gets_one_clear_line(shop: Stentor, args: tuple[str, ...], code: int, wrong: str) -> None:
    text = shop("choose", *args, code=code)
    assert wrong in " ".join(text.split())
    assert "Traceback" not in text
