"""How a cluster's CPUs and GPUs are shared: a job must finish on any of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import cluster
from pipeline.cluster import Node, Shares, shares

CPUS = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16, 64])
CLUSTERS = st.lists(
    st.builds(Node, cpus=CPUS, gpus=st.sampled_from([0, 0, 0, 1, 4])), min_size=1, max_size=6
).filter(lambda nodes: any(node.cpus for node in nodes))
WORKERS = st.none() | st.integers(1, 8)


def divide(nodes: list[Node], workers: int | None) -> Shares | None:
    """The shares, or None where so many workers are refused."""
    try:
        return shares(nodes, workers)
    except ValueError:
        assert workers is not None, "a default must fit"
        return None


def place(nodes: list[Node], found: Shares) -> list[float] | None:
    """CPUs that stay free on each node when every detector is on one, spread evenly; None: they don't fit."""
    free = [[node.cpus, node.gpus, 0] for node in nodes]
    for _ in range(found.detectors):
        room = [n for n in free if n[0] >= found.detector_cpus - 1e-9 and n[1] >= found.detector_gpus - 1e-9]
        if not room:
            return None
        chosen = max(room, key=lambda n: n[0] / (n[2] + 1))
        chosen[0] -= found.detector_cpus
        chosen[1] -= found.detector_gpus
        chosen[2] += 1
    return [cpus for cpus, _, _ in free]


@given(CLUSTERS, WORKERS)
def test_all_detectors_and_a_task_of_each_other_stage_fit_on_some_node_at_once(nodes, workers):
    found = divide(nodes, workers)
    if found is None:
        return
    free = place(nodes, found)
    assert free is not None
    assert max(free) >= found.decode_cpus + found.stage_cpus


@given(CLUSTERS, WORKERS)
def test_decoding_fits_beside_the_detectors_on_gpu_nodes_alone_and_without_them(nodes, workers):
    found = divide(nodes, workers)
    gpus = [node for node in nodes if node.gpus]
    if found is None or not any(node.cpus for node in gpus):
        return
    free = place(gpus, found)
    assert free is not None
    assert max(free) >= found.decode_cpus + found.stage_cpus
    others = [node.cpus for node in nodes if not node.gpus and node.cpus]
    assert not others or max(others) >= found.decode_cpus + found.stage_cpus


@given(st.integers(1, 4), CPUS.filter(bool), WORKERS)
def test_when_half_of_the_nodes_are_lost_the_others_still_hold_every_stage(pairs, cpus, workers):
    found = divide([Node(cpus)] * 2 * pairs, workers)
    if found is None:
        return
    free = place([Node(cpus)] * pairs, found)
    assert free is not None
    assert max(free) >= found.decode_cpus + found.stage_cpus


@given(CLUSTERS, WORKERS)
def test_no_share_is_finer_than_ray_can_count(nodes, workers):
    found = divide(nodes, workers)
    if found is None:
        return
    for share in (found.decode_cpus, found.stage_cpus):
        assert share >= 0.001
    for share in (found.detector_cpus, found.detector_gpus, found.decode_cpus, found.stage_cpus):
        assert share == round(share, 4)
    assert found.threads_per_detector >= 1


@given(CLUSTERS, WORKERS)
def test_decoding_never_asks_for_what_a_detector_asks_for(nodes, workers):
    """Ray Data would fuse a task with the actor after it, and they would take turns."""
    found = divide(nodes, workers)
    assert found is None or found.decode_cpus != found.detector_cpus or found.detector_gpus


def test_a_detector_is_made_for_one_node_not_for_the_sum_of_all():
    assert shares([Node(0), Node(2), Node(2), Node(2)], 1).detector_cpus <= 2
    assert shares([Node(64), Node(1)], 2).detector_cpus == 8


def test_by_default_there_is_a_detector_for_each_gpu_or_else_for_each_two_cpus_of_a_node():
    assert shares([Node(0), Node(8, 1), Node(16, 4), Node(64)]).detectors == 5
    assert shares([Node(0), Node(1), Node(2), Node(4), Node(9)]).detectors == 8


@pytest.mark.parametrize(
    ("nodes", "workers", "fit"), [([Node(1)], 6, 5), ([Node(2)] * 3, 99, 15), ([Node(4, 1)], 11, 10)]
)
def test_more_workers_than_fit_are_refused_with_the_number_that_does(nodes, workers, fit):
    with pytest.raises(ValueError, match=f"{workers} workers .* ask for {fit} at most"):
        shares(nodes, workers)
    assert shares(nodes, fit).detectors == fit


def test_a_training_of_more_workers_than_gpus_is_refused_instead_of_waiting_for_ever(monkeypatch):
    monkeypatch.setattr(cluster, "_nodes", lambda: [Node(8, 1), Node(8), Node(8, 2)])
    cluster.check_gpus(3)
    with pytest.raises(ValueError, match="4 workers take a GPU each, the cluster has 3; ask for 3 at most"):
        cluster.check_gpus(4)
    monkeypatch.setattr(cluster, "_nodes", lambda: [Node(8), Node(8)])
    cluster.check_gpus(4)


def test_the_detectors_of_a_node_share_its_cores():
    assert shares([Node(8)], 1).threads_per_detector == 8
    assert shares([Node(8)], 2).threads_per_detector == 4
    assert shares([Node(8)], 20).threads_per_detector == 1
    assert shares([Node(8)] * 3, 3).threads_per_detector == 8
    # Two cores that pass for four logical CPUs.
    assert shares([Node(4)], 1, cores_per_cpu=0.5).threads_per_detector == 2
    assert shares([Node(4)], 2, cores_per_cpu=0.5).threads_per_detector == 1


def test_a_detector_takes_one_gpu_at_most_and_several_may_share_it():
    assert shares([Node(16, 4)]).detector_gpus == 1.0
    assert shares([Node(16, 4)], 2).detector_gpus == 1.0
    assert shares([Node(16, 1)], 4).detector_gpus == 0.25
    assert shares([Node(16, 1)] * 2, 3).detector_gpus == 0.5
    assert shares([Node(16)]).detector_gpus == 0.0
