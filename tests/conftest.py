import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings
from s3fs import S3FileSystem

from infra.s3_server import S3Server, s3_server

# No test fails for want of time.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests in one process, for what they share; all files that use one cluster in the same."""
    on_cluster = {item.path for item in items if "two_cpus" in getattr(item, "fixturenames", ())}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("cluster" if item.path in on_cluster else str(item.path)))


@pytest.fixture(scope="session", autouse=True)
def ray_environment() -> Iterator[None]:
    """Every test's Ray is a local one: no token, no cluster of the user's, no usage report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with the buckets ``photos`` and ``out``; from here on the environment points to it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        with s3_server(tmp_path_factory.mktemp("s3"), buckets=["photos", "out"]) as server:
            for name, value in server.environment().items():
                patch.setenv(name, value)
            # fsspec keeps one instance per set of arguments, and the environment is no argument.
            S3FileSystem.clear_instance_cache()
            yield server
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of photos given for research; tests that need them skip without it."""
    named = os.environ.get("BDNET_DATA")
    if not named:
        pytest.skip("BDNET_DATA is not set: it names the folder that holds blurraw/, archive/ and peer_maps/")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"BDNET_DATA names {folder}, which is not a folder")
    return folder


@pytest.fixture(scope="session")
def sample_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's archive (``photos/``, ``masks/``, ``truth.json``), made once for all processes of pytest.

    Tests only read it.
    """
    from infra.sample_archive import make_sample_archive

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sample-archive"
    with FileLock(f"{folder}.lock"):
        if not (folder / "truth.json").exists():
            make_sample_archive(folder)
    return folder
