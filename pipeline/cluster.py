"""Join the Ray cluster that ``RAY_ADDRESS`` names, or start a local one; say how its CPUs are shared.

Ray gives every task and actor a whole logical CPU by default. On a small machine the actors then hold
all of them and the tasks that feed them wait for ever, so shares are given on purpose: a stage's share is
never more than what leaves room for the others.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor


@dataclass(frozen=True)
class Shares:
    """Logical CPUs and GPUs of one task or actor of each stage, and how many detectors run."""

    detectors: int
    detector_cpus: float
    detector_gpus: float
    decode_cpus: float
    stage_cpus: float
    threads_per_detector: int


def shares(cpus: float, gpus: float, workers: int | None = None) -> Shares:
    """Divide a cluster of ``cpus`` logical CPUs and ``gpus`` GPUs among the stages of a run.

    Decode and detect never ask for the same resources: Ray Data would fuse them into one actor and run
    them one after the other.
    """
    assert cpus > 0
    on_gpu = gpus >= 1
    detectors = workers or max(1, int(gpus if on_gpu else cpus // 4))
    # Half of the CPUs detect; decoding and staging share the rest, whatever the number of detectors.
    detector_cpus = round(cpus / 2 / detectors, 3)
    if on_gpu:
        detector_cpus = min(0.5, detector_cpus)  # it only feeds the GPU
    decode_cpus = round(min(1.0, cpus / 4), 3)
    if decode_cpus == detector_cpus:
        decode_cpus = round(decode_cpus * 0.9, 3)
    return Shares(
        detectors=detectors,
        detector_cpus=detector_cpus,
        detector_gpus=min(1.0, gpus / detectors) if on_gpu else 0.0,
        decode_cpus=decode_cpus,
        stage_cpus=round(min(0.25, cpus / 16), 3),
        threads_per_detector=1 if on_gpu else max(1, (os.cpu_count() or 1) // detectors),
    )


@contextlib.contextmanager
def connect(workers: int | None = None) -> Iterator[Shares]:
    """Join or start Ray for the length of a job and yield the shares of its stages.

    With ``RAY_ADDRESS`` set (as ``ray job submit`` does) the job joins that cluster and leaves it running.
    Otherwise a local Ray starts with as many logical CPUs as the machine has cores, but at least four, and
    stops with the job. ``RAY_AUTH_MODE`` is left as the user set it; a local Ray listens on loopback.

    Raises:
        OSError: Ray can't be joined or started.
    """
    quiet_ray_data()
    _init(os.environ.get("RAY_ADDRESS"))
    try:
        total = ray.cluster_resources()
        yield shares(total.get("CPU", 1.0), total.get("GPU", 0.0), workers)
    finally:
        ray.shutdown()


def _init(address: str | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        if address:
            ray.init(address=address, **quiet)
            return
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # Ray's core prints to the terminal what belongs into its log files; errors come as exceptions.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # Without "local" Ray joins whatever `ray start` left on this machine, and refuses num_cpus then.
        ray.init(address="local", num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False, **quiet)
    except Exception as error:  # Ray raises bare Exception when a node doesn't come up in time.
        where = f"the Ray cluster at {address} can't be joined" if address else "a local Ray did not start"
        raise OSError(f"{where}: {' '.join(str(error).split())}") from error


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
