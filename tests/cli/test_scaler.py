"""``stentor scaler`` as people use it; what it answers is in tests/test_keda.py."""

import signal

from tests.cli.conftest import Stentor


def test_it_answers_until_it_is_stopped(shop: Stentor) -> None:
    shop("declare", "shop")
    process = shop.start("scaler", "--listen", "127.0.0.1:0")
    process.until("answering KEDA at port")
    process.send(signal.SIGTERM)
    assert process.end() == 0


def test_an_address_that_cannot_be_used_is_one_line(shop: Stentor) -> None:
    shop("declare", "shop")
    assert "cannot serve at nowhere:x" in shop("scaler", "--listen", "nowhere:x", code=3)
