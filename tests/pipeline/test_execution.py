"""How a to-do is cut into blocks, and what a run says about its own time."""

import pytest

from pipeline.execution import LARGEST_BLOCK, SMALLEST_BLOCK, Outcome, photos_of_block


@pytest.mark.parametrize("photos", [1, SMALLEST_BLOCK, 100, 2_000, 50_000])
def test_blocks_are_small_at_both_ends_of_a_run_and_large_between(photos: int) -> None:
    blocks, left = [], photos
    while left > 0:
        blocks.append(min(left, photos_of_block(photos - left, left)))
        left -= blocks[-1]
    assert sum(blocks) == photos
    assert max(blocks) <= LARGEST_BLOCK
    assert all(block == SMALLEST_BLOCK for block in blocks[:8][:-1])
    if photos >= 2_000:
        assert max(blocks) == LARGEST_BLOCK
        assert max(blocks[-4:]) == SMALLEST_BLOCK
        # Most photos lie in large blocks: small ones cost tasks and files.
        assert sum(block for block in blocks if block == LARGEST_BLOCK) >= photos / 3


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
