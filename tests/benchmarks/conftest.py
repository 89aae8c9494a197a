import pytest

from benchmarks import command


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder in place of benchmarks/results."""
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    return tmp_path
