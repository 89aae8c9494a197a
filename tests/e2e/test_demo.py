"""The shipped model on the sample archive, as `make demo` runs it."""

import json
from pathlib import Path

import pytest

from infra.demo_summary import Settings, summarize
from tests.e2e.harness import Cluster, audit, table_rows

pytestmark = pytest.mark.e2e

# A photo and what was made of it by blurring all of it.
SHARP_AND_BLURRED = (
    ("garage/motorcycle.jpg", "garage/motorcycle-defocused.jpg"),
    ("garage/motorcycle.jpg", "garage/motorcycle-shaken.jpg"),
    ("studio/astronaut.jpg", "studio/astronaut-defocused.jpg"),
    ("studio/astronaut.jpg", "studio/astronaut-shaken.jpg"),
    ("café/espresso.jpg", "café/espresso-shaken.jpg"),
    ("launch/rocket.jpg", "launch/rocket-shaken.jpg"),
    ("lake/pagoda-burst-2.jpg", "lake/pagoda-burst-3.jpg"),
    ("lake/pagoda-burst-2.jpg", "lake/pagoda-burst-1.jpg"),
)


@pytest.fixture(scope="module")
def demo(sample_archive: Path, two_cpus: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's --out."""
    out = tmp_path_factory.mktemp("demo")
    ran = audit(sample_archive / "photos", "--out", out, environment={"RAY_ADDRESS": two_cpus.address})
    assert ran.code == 0, ran.err
    return out


def test_the_shipped_model_tells_a_blurred_photo_from_its_sharp_original(
    demo: Path, sample_archive: Path
) -> None:
    prefix = f"{sample_archive}/photos/2024/"
    blurred = {row["uri"].removeprefix(prefix): row["blurred_fraction"] for row in table_rows(demo)}
    for sharp, made in SHARP_AND_BLURRED:
        assert blurred[made] > blurred[sharp] + 0.25, (made, blurred[made], sharp, blurred[sharp])


def test_the_summary_has_a_line_for_each_photo_and_the_place_of_the_report(
    demo: Path, sample_archive: Path
) -> None:
    lines = summarize(Settings(str(demo)))
    truth = json.loads((sample_archive / "truth.json").read_text())
    assert len([line for line in lines if line.startswith("2024/")]) == len(truth)
    assert Path(lines[-1].removeprefix("report: ")).is_file()
