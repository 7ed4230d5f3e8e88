"""Small real data for the tests of the lab."""

import pytest

from convkit.lab import data


@pytest.fixture(scope="session")
def digits5k() -> data.Data:
    return data.load("digits5k")


@pytest.fixture(scope="session")
def few(digits5k) -> data.Data:
    """About 200 digits to train, 60 to validate and 100 to test."""
    return digits5k.take(200, 60, 100)


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch, tmp_path_factory):
    """The tests do not depend on what data the machine happens to have, nor on a network."""
    monkeypatch.delenv("CONVKIT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for scheme in ("http", "https", "all"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("no_proxy", "127.0.0.1")
