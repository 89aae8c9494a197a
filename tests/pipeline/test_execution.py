"""What a run says about its own time."""

import pytest

from pipeline.execution import Outcome


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
