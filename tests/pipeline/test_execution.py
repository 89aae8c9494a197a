"""How a to-do is cut into blocks, and what a run says about its own time."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.execution import LARGEST_BLOCK, PHOTOS_PER_WINDOW, SMALLEST_BLOCK, Outcome, _windows
from pipeline.schema import LISTING


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
    windows = list(_windows(write_to_do(tmp_path, lengths), detectors=2))
    uris = [uri for window in windows for block in window for uri in block["uri"].to_pylist()]
    assert len(uris) == len(set(uris)) == sum(lengths)
    for window in windows:
        assert 0 < sum(map(len, window)) < PHOTOS_PER_WINDOW + LARGEST_BLOCK


@pytest.mark.parametrize("detectors", [1, 2, 32])
def test_blocks_are_small_at_both_ends_of_a_run_and_large_between(tmp_path: Path, detectors: int) -> None:
    (window,) = _windows(write_to_do(tmp_path, [20_000]), detectors)
    blocks = [len(block) for block in window]
    # Each detector has two small ones, so that all begin early and end together.
    ends = 2 * detectors
    assert max(blocks[:ends]) == SMALLEST_BLOCK
    assert max(blocks[-ends:]) == SMALLEST_BLOCK
    assert max(blocks) == LARGEST_BLOCK
    assert sum(block for block in blocks if block == LARGEST_BLOCK) >= 20_000 / 2


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
