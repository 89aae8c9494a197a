"""How a to-do is cut into blocks, and what a run says about its own time."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import execution
from pipeline.cluster import Node, shares
from pipeline.execution import (
    BLOCK_BYTES,
    BLOCK_FILE_BYTES,
    LARGEST_BLOCK,
    PHOTOS_PER_WINDOW,
    SMALLEST_BLOCK,
    Outcome,
    Plan,
    _check_denied,
    _first_that_fit,
    _windows,
    work_off,
)
from pipeline.ledger import Committer
from pipeline.schema import LISTING
from pipeline.steps import Provenance


def write_to_do(folder: Path, lengths: list[int]) -> dict[str, int]:
    to_do = {}
    for number, length in enumerate(lengths):
        uris = [f"/archive/{number}-{index}.jpg" for index in range(length)]
        rows = [{"uri": uri, "etag": "e", "size_bytes": 1, "modified_at": None} for uri in uris]
        shard = str(folder / f"{number}.parquet")
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(LISTING)), shard)
        to_do[shard] = length
    return to_do


@pytest.mark.parametrize("lengths", [[1], [SMALLEST_BLOCK], [100], [1_500, 600], [60_000]])
def test_every_photo_of_a_to_do_lies_in_one_block(tmp_path: Path, lengths: list[int]) -> None:
    windows = list(_windows(write_to_do(tmp_path, lengths), detectors=2, working_size=640))
    uris = [uri for window in windows for block in window for uri in block["uri"].to_pylist()]
    assert len(uris) == len(set(uris)) == sum(lengths)
    for window in windows:
        assert 0 < sum(map(len, window)) < PHOTOS_PER_WINDOW + LARGEST_BLOCK


def test_a_block_of_large_photos_holds_fewer_of_them(tmp_path: Path) -> None:
    (window,) = _windows(write_to_do(tmp_path, [2_000]), detectors=2, working_size=4096)
    assert {len(block) for block in window} == {BLOCK_BYTES // (3 * 4096**2)}
    assert sum(map(len, window)) == 2_000


@pytest.mark.parametrize(
    ("sizes", "fit"),
    [
        ([1] * 64, 64),
        ([BLOCK_FILE_BYTES // 4] * 8, 4),
        ([BLOCK_FILE_BYTES // 4 + 1] * 8, 3),
        ([BLOCK_FILE_BYTES + 1, 1], 1),
        ([1, 2**63 - 1, 2**63 - 1], 1),  # a manifest may say so
    ],
)
def test_a_block_reads_so_many_bytes(sizes: list[int], fit: int) -> None:
    assert _first_that_fit(np.array(sizes)) == fit


def test_photos_as_large_as_a_block_have_one_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "BLOCK_FILE_BYTES", 1)
    (window,) = _windows(write_to_do(tmp_path, [20]), detectors=2, working_size=640)
    assert [len(block) for block in window] == [1] * 20


@pytest.mark.parametrize(("gpus", "working_size", "batch"), [(0, 640, None), (1, 640, 64), (1, 4096, 2)])
def test_a_detector_takes_block_by_block_and_on_a_gpu_as_many_photos_as_a_block_may_hold(
    gpus: int, working_size: int, batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    class Dataset:
        def map_batches(self, step: Any, **options: Any) -> "Dataset":
            asked[step] = options
            return self

    monkeypatch.setattr(execution.ray.data, "from_arrow", lambda tables: Dataset())
    monkeypatch.setattr(execution.cluster, "bound_decoded", lambda *_: None)
    monkeypatch.setattr(execution.cluster, "off_gpu_nodes", dict)
    plan = Plan(
        out="/out",
        model="bdnet-topdown",
        working_size=working_size,
        masks="table",
        max_denied=0.5,
        listed=1,
        provenance=Provenance("m", "a", "r"),
        shares=shares([Node(cpus=4, gpus=gpus)]),
    )
    execution._steps([pa.table({"uri": ["/a.jpg"]})], plan)
    detector = asked[execution.Detector]
    # Ray refuses a step on a GPU that has no batch size.
    assert (detector["num_gpus"], detector["batch_size"]) == (gpus or None, batch)


@pytest.mark.parametrize("detectors", [1, 2, 32])
def test_blocks_are_small_at_both_ends_of_a_run_and_large_between(tmp_path: Path, detectors: int) -> None:
    (window,) = _windows(write_to_do(tmp_path, [20_000]), detectors, working_size=640)
    blocks = [len(block) for block in window]
    # Each detector has two small ones, so that all begin early and end together.
    ends = 2 * detectors
    assert max(blocks[:ends]) == SMALLEST_BLOCK
    assert max(blocks[-ends:]) == SMALLEST_BLOCK
    assert max(blocks) == LARGEST_BLOCK
    assert sum(block for block in blocks if block == LARGEST_BLOCK) >= 20_000 / 2


def test_a_signal_that_came_in_the_last_moment_ends_the_run_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_rows(dataset: object) -> Iterator[list[dict[str, Any]]]:
        yield []

    monkeypatch.setattr(execution, "_steps", lambda window, plan: None)
    monkeypatch.setattr(execution, "stream", no_rows)
    monkeypatch.setattr(execution._Noted, "lasts", lambda noted: execution.GRACE_SECONDS / 2)
    plan = Plan("out", "model", 640, "table", 1.0, 1, Provenance("m", "a", "r"), shares([Node(4)]))
    committer = cast(Committer, SimpleNamespace(flush=lambda if_due: None))
    with pytest.raises(OSError, match="told to end"):
        work_off(write_to_do(tmp_path, [1]), plan, committer, committer, lambda: None)


@pytest.mark.parametrize(
    ("seconds", "step"),
    [
        ({"detect": 90, "encode": 5, "idle": 5, "fetch": 500, "decode": 50}, "detect"),
        ({"detect": 40, "encode": 55, "idle": 5, "fetch": 500, "decode": 50}, "encode"),
        # Eight threads fetch at once: 500 s of their waiting is less than 70 s of a core that decodes.
        ({"detect": 40, "encode": 5, "idle": 55, "fetch": 500, "decode": 70}, "decode"),
        ({"detect": 40, "encode": 5, "idle": 55, "fetch": 900, "decode": 70}, "fetch"),
        ({}, None),
    ],
)
def test_the_step_that_bounds_a_run_is_named(seconds: dict[str, float], step: str | None) -> None:
    outcome = Outcome()
    outcome.seconds.update(seconds)
    assert outcome.bound_by() == step


@pytest.mark.parametrize(
    ("listed", "to_do", "done", "denied", "max_denied", "stops"),
    [
        pytest.param(100, 100, 100, 50, 0.5, False, id="as many as may be"),
        pytest.param(100, 100, 60, 51, 0.5, True, id="too many"),
        pytest.param(1_000_000, 1_000_000, 1_000, 1_000, 0.5, True, id="all from the start"),
        pytest.param(1_000_000, 1_000_000, 1_000, 999, 0.5, False, id="all but one from the start"),
        pytest.param(1_000_000, 3, 3, 3, 0.5, False, id="a quiet night, the same three as ever"),
        pytest.param(1_000_000, 2_000, 2_000, 2_000, 0.5, False, id="a quiet night, the same two thousand"),
        pytest.param(100, 100, 100, 100, 1.0, False, id="all, and that is right so"),
        pytest.param(2, 1, 1, 1, 0.0, True, id="none may be"),
    ],
)
def test_a_run_stops_where_too_many_of_the_listed_photos_are_denied(
    listed: int, to_do: int, done: int, denied: int, max_denied: float, stops: bool
) -> None:
    plan = Plan(
        "out", "model", 640, "table", max_denied, listed, Provenance("m", "a", "r"), shares([Node(4)])
    )
    outcome = Outcome()
    outcome.photos = done
    outcome.by_status.update(denied=denied, ok=done - denied)
    if not stops:
        _check_denied(outcome, to_do, plan)
        return
    with pytest.raises(OSError, match=f"{denied:,} of {done:,} photos read are denied, of {listed:,} listed"):
        _check_denied(outcome, to_do, plan)
