import pytest

from benchmarks import tables


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder in place of benchmarks/results."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path
