"""How a cluster's CPUs are shared: a job must finish on the smallest machine."""

import itertools

import pytest

from pipeline.cluster import shares

CPUS = (1, 2, 3, 4, 6, 8, 16, 64)
EVERY_CLUSTER = list(itertools.product(CPUS, (0, 1, 4), (None, 1, 2, 3, 8)))


@pytest.mark.parametrize(("cpus", "gpus", "workers"), EVERY_CLUSTER)
def test_all_detectors_and_one_task_of_each_other_stage_fit(cpus, gpus, workers):
    given = shares(cpus, gpus, workers)
    assert given.detectors == (workers or gpus or max(1, cpus // 4))
    detecting = given.detectors * given.detector_cpus
    assert detecting + given.decode_cpus + given.stage_cpus <= cpus
    assert given.detectors * given.detector_gpus <= gpus
    # Ray Data would fuse a task with the actor after it that asks for the same, and they would take turns.
    assert given.decode_cpus != given.detector_cpus
    assert given.threads_per_detector >= 1


@pytest.mark.parametrize(("cpus", "gpus", "workers"), EVERY_CLUSTER)
def test_no_share_is_finer_than_ray_can_count(cpus, gpus, workers):
    given = shares(cpus, gpus, workers)
    for share in (given.detector_cpus, given.decode_cpus, given.stage_cpus):
        assert share >= 0.001
        assert share == round(share, 4)


def test_detectors_share_the_cores_of_this_machine(monkeypatch):
    monkeypatch.setattr("pipeline.cluster.os.cpu_count", lambda: 8)
    assert shares(8, 0, 1).threads_per_detector == 8
    assert shares(8, 0, 2).threads_per_detector == 4
    assert shares(8, 0, 20).threads_per_detector == 1


def test_a_detector_takes_one_gpu_at_most_and_several_may_share_it():
    assert shares(16, 4).detector_gpus == 1.0
    assert shares(16, 4, 2).detector_gpus == 1.0
    assert shares(16, 1, 4).detector_gpus == 0.25
    assert shares(16, 0).detector_gpus == 0.0
