"""Join the Ray cluster that ``RAY_ADDRESS`` names, or start a local one; say how its nodes are shared.

Ray gives every task and actor a whole logical CPU by default. On a small machine the actors then hold
all of them and the tasks that feed them wait for ever, so shares are given on purpose: a stage's share is
never more than what leaves room for the others on the node where it runs.
"""

import contextlib
import logging
import math
import os
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from ray._private import auto_init_hook
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor

log = logging.getLogger("bdnet")

# Where detectors get less of a CPU or GPU than this, memory goes to copies of the network, to no avail.
SMALLEST_SHARE = 0.1
# Detectors of few threads wait less for threads that decoding has interrupted: on 2 cores two with a thread
# take 1.2 times as many photos as one with two (benchmarks/results/growth.csv).
CPUS_PER_DETECTOR = 2
# An autoscaler that has no node yet needs some minutes for the first one.
NODES_WITHIN_SECONDS = 600.0
# Blocks that may wait, decoded or being decoded, for each detector. On a CPU a block takes it many seconds;
# a GPU takes blocks as fast as some ten decoders make them.
BLOCKS_AHEAD_OF_CPU = 4
BLOCKS_AHEAD_OF_GPU = 16


# By default glibc gives each thread of a worker an arena of its own, and what decoding frees in one serves no
# other: workers were seen to grow by 4 KB a photo (benchmarks/soak.py).
WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2"}


@dataclass(frozen=True)
class Node:
    """Logical CPUs and GPUs of one node of a cluster."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Shares:
    """Logical CPUs and GPUs of one task or actor of each stage, and how many detectors run."""

    detectors: int
    detector_cpus: float
    detector_gpus: float
    decode_cpus: float
    stage_cpus: float
    threads_per_detector: int


def shares(nodes: Sequence[Node], workers: int | None = None, cores_per_cpu: float = 1.0) -> Shares:
    """Divide a cluster, of which one node at least has CPUs, among the stages of a run.

    Detectors run on the nodes with GPUs where there are such. A task or actor runs on *one* node: shares
    come from single nodes, never from the cluster's total.

    Args:
        nodes: the nodes that are there now; those that come later run more tasks of the other stages.
        workers: detectors; by default one per GPU, or one per two CPUs of a node, at least one.
        cores_per_cpu: cores behind one logical CPU.

    Raises:
        ValueError: more ``workers`` than fit.
    """
    assert any(node.cpus > 0 for node in nodes)
    gpus = sum(int(node.gpus) for node in nodes)
    # Decoding keeps off nodes with GPUs, but falls back on them: it must fit on either.
    groups = [[node.cpus for node in nodes if (node.gpus >= 1) == on_gpu] for on_gpu in (False, True)]
    largest = min(max(cpus) for cpus in groups if any(cpus))
    decode_cpus = _floor(min(1.0, largest / 4))
    if gpus:
        detectors = workers or gpus
        each_gpu = math.ceil(detectors / gpus)
        detector_gpus = _floor(1 / each_gpu)
        # It only feeds the GPU, and half of the node's CPUs stay free for other stages.
        room = min(node.cpus / (2 * int(node.gpus) * each_gpu) for node in nodes if node.gpus >= 1)
        detector_cpus, threads = _floor(min(0.5, room)), 1
        if detector_gpus < SMALLEST_SHARE:
            raise _too_many(detectors, int(1 / SMALLEST_SHARE) * gpus, "GPUs")
    else:
        sizes = Counter(node.cpus for node in nodes if node.cpus > 0)
        detectors = workers or sum(
            max(1, int(cpus / CPUS_PER_DETECTOR)) * count for cpus, count in sizes.items()
        )
        # On a single node detectors hold half of the CPUs. On several they hold a quarter: where half of the
        # nodes are lost, the others hold all detectors and still have CPUs left to feed them.
        part = 2 if sizes.total() == 1 else 4
        detector_cpus, detector_gpus = _largest_that_fits(sizes, detectors, part), 0.0
        if detector_cpus < SMALLEST_SHARE:
            fit = sum(int(cpus / part / SMALLEST_SHARE) * count for cpus, count in sizes.items())
            raise _too_many(detectors, max(1, fit), "CPUs")
        # Threads are not logical CPUs: reading and staging leave most of theirs idle.
        threads = max(1, int(detector_cpus * part * cores_per_cpu))
    if decode_cpus == detector_cpus:
        # Ray Data fuses stages that ask for the same into one actor, and they would take turns.
        decode_cpus = _floor(decode_cpus * 0.9)
    return Shares(
        detectors=detectors,
        detector_cpus=detector_cpus,
        detector_gpus=detector_gpus,
        decode_cpus=decode_cpus,
        stage_cpus=_floor(min(0.25, largest / 16)),
        threads_per_detector=threads,
    )


def _largest_that_fits(sizes: Counter[float], detectors: int, part: int) -> float:
    """Most CPUs that each detector can have when they hold no more than 1/``part`` of any node."""
    candidates = {_floor(cpus / part / count) for cpus in sizes for count in range(1, detectors + 1)}
    fitting = [
        share
        for share in candidates
        if share > 0
        and sum(int(cpus / part / share + 1e-6) * count for cpus, count in sizes.items()) >= detectors
    ]
    return max(fitting, default=0.0)


def _floor(share: float) -> float:
    # Ray counts in ten-thousandths; rounded up, the last detector would not fit.
    return math.floor(share * 1000 + 1e-6) / 1000


def _too_many(detectors: int, fit: int, of: str) -> ValueError:
    return ValueError(f"{detectors} workers are more than the cluster's {of} hold; ask for {fit} at most")


@contextlib.contextmanager
def connect(workers: int | None = None) -> Iterator[Shares]:
    """Join or start Ray for the length of a job and yield the shares of its stages.

    With ``RAY_ADDRESS`` set (as ``ray job submit`` does) the job joins that cluster and leaves it running.
    Otherwise a local Ray starts with as many logical CPUs as the machine has cores, but at least four, and
    stops with the job. It listens on all of the machine's addresses, so it wants a token, made for this run
    and known to its processes alone, unless the user has set ``RAY_AUTH_MODE=disabled``.

    Raises:
        OSError: Ray can't be joined or started, or no node of the cluster gets a CPU in time.
        ValueError: more ``workers`` than fit.
    """
    quiet_ray_data()
    address = os.environ.get("RAY_ADDRESS")
    cores = os.cpu_count() or 1
    logical = max(4, cores)
    with signals_kept():
        _init(address, logical)
    try:
        if address:
            yield shares(_nodes_with_cpus(address), workers)
        else:
            yield shares(_nodes(), workers, cores_per_cpu=cores / logical)
    finally:
        # Threads of Ray Data that outlive a run that failed would start Ray anew.
        auto_init_hook.enable_auto_connect = False
        ray.shutdown()


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Give SIGINT and SIGTERM back to who had them: Ray and Ray Train take them, and end with other codes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _init(address: str | None, logical_cpus: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}

    # A node that joins unpacks the job's working directory anew. Where it shares Ray's folder with others, as
    # nodes of one machine do, their workers lose the folder that they stand in, and torch can't be imported.
    # A function in a function, for Ray to send it by value: before the hook there may be nothing to import.
    def leave_working_dir() -> None:
        os.chdir("/")

    try:
        if address:
            # A copy: Ray adds to it.
            environment = dict(WORKER_ENVIRONMENT)
            runtime_env = {"worker_process_setup_hook": leave_working_dir, "env_vars": environment}
            ray.init(address=address, runtime_env=runtime_env, **quiet)
            return
        for name, value in WORKER_ENVIRONMENT.items():
            os.environ.setdefault(name, value)  # workers inherit it
        if os.environ.get("RAY_AUTH_MODE") != "disabled":
            # Ray's default for a local cluster is a token too, but one that it leaves in ~/.ray for good.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it says so each time
        # Without "local" Ray joins whatever `ray start` left on this machine, and refuses num_cpus then.
        ray.init(address="local", num_cpus=logical_cpus, include_dashboard=False, **quiet)
    except Exception as error:  # Ray raises bare Exception when a node doesn't come up in time.
        where = f"the Ray cluster at {address} can't be joined" if address else "a local Ray did not start"
        raise OSError(f"{where}: {' '.join(str(error).split())}") from error


def _nodes() -> list[Node]:
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(found.get("CPU", 0.0), found.get("GPU", 0.0)) for found in resources]


def _nodes_with_cpus(address: str) -> list[Node]:
    """The cluster's nodes, as soon as one has CPUs; a task that waits for them tells the autoscaler."""
    if not any(node.cpus > 0 for node in _nodes()):
        log.info("waiting for a node with CPUs")
        probe = ray.remote(num_cpus=1)(lambda: None).remote()
        if not ray.wait([probe], timeout=NODES_WITHIN_SECONDS)[0]:
            raise OSError(
                f"no node of the Ray cluster at {address} got a CPU within {NODES_WITHIN_SECONDS:.0f} s; "
                "add one with `ray start --address=… --num-cpus=…`"
            )
    return _nodes()


def check_gpus(workers: int) -> None:
    """Refuse a training that Ray would let wait for ever.

    Raises:
        ValueError: the cluster has GPUs, and fewer than ``workers``, which take one each.
    """
    gpus = sum(int(node.gpus) for node in _nodes())
    if 0 < gpus < workers:
        raise ValueError(f"{workers} workers take a GPU each, the cluster has {gpus}; ask for {gpus} at most")


def trainings_at_once(workers: int) -> int:
    """How many trainings of ``workers`` workers fit on the cluster: on its GPUs, or one worker a node."""
    nodes = _nodes()
    gpus = sum(int(node.gpus) for node in nodes)
    places = gpus or sum(node.cpus > 0 for node in nodes)
    return max(1, places // workers)


def off_gpu_nodes() -> dict[str, Any]:
    """Options of a task that keep it off the nodes that have GPUs now, as long as it fits on another node.

    Ray Data spreads tasks evenly, also over the CPUs that feed GPUs. Tasks wait for a node without GPUs
    while there is one; where there is none, or the last one is lost, they run anywhere.
    """
    with_gpus = [node["NodeID"] for node in ray.nodes() if node["Resources"].get("GPU", 0) >= 1]
    if not with_gpus:
        return {}
    label = "ray.io/node-id"
    return {
        "label_selector": {label: f"!in({','.join(with_gpus)})"},
        # All nodes; with an empty selector tasks were seen on GPU nodes while others were free.
        "fallback_strategy": [{"label_selector": {label: "!none"}}],
    }


def bound_decoded(shares: Shares, block_bytes: int) -> None:
    """Let the datasets made from now on hold a few blocks for each detector; ``block_bytes``: of pixels.

    By default Ray Data decodes ahead until half of the object store is full.
    """
    ahead = BLOCKS_AHEAD_OF_GPU if shares.detector_gpus else BLOCKS_AHEAD_OF_CPU
    options = ray.data.DataContext.get_current().execution_options
    options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=shares.detectors * ahead * block_bytes
    )


def quiet_ray_data() -> None:
    """Keep Ray's own progress and notices off the terminal, and its scheduling loop off a whole core.

    The settings travel with a dataset: processes that make datasets themselves call this too.
    """
    logging.getLogger("ray").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # An error comes as itself, not as "UDF failed"; its traceback goes to Ray's log files alone.
    context.raise_original_map_exception = True
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL)
    context.custom_execution_callback_classes = [Breather]


class Breather(ExecutionCallback):
    """Lets Ray Data's scheduling loop breathe.

    When the consumer is the slowest step, the loop (Ray 2.60) has no task to wait for and spins: half a core
    was seen to go there beside a training worker. Tasks last tenths of a second, so 10 ms are not missed.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Sleep for a moment."""
        time.sleep(0.01)
