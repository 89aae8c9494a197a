from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bdnet.model import save
from bdnet.networks import build
from infra.s3_server import S3Server
from tests.e2e.harness import Cluster, ray_cluster


def _untrained(folder: Path, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save(build("bdnet-resnet18"), str(folder), {"arch": "bdnet-resnet18"})
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network: what it says of a photo means nothing, but is the same each time."""
    return _untrained(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _untrained(tmp_path_factory.mktemp("other-model"), 1)


# An idle cluster still takes a tenth of a core: it ends with the tests that want it.
@pytest.fixture(scope="package")
def two_cpus(s3: S3Server) -> Iterator[Cluster]:
    """A cluster with two logical CPUs and a dashboard, whose workers have the keys of the S3 server.

    It has a GPU, as far as Ray knows: audits that start a Ray of their own have none.
    """
    with ray_cluster(2, gpus=1, dashboard=True) as cluster:
        yield cluster


@pytest.fixture
def joined(two_cpus: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The commands of this test join the cluster of two CPUs."""
    monkeypatch.setenv("RAY_ADDRESS", two_cpus.address)
    return two_cpus
