"""`ray job submit` brings the code to a cluster and runs it there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from tests.e2e.harness import JOB_WITHIN_S, RAY, ROOT, SMALL, Cluster, table_rows

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rooms that a job needs, and nothing else of the repository."""
    folder = tmp_path_factory.mktemp("code")
    for room in ("bdnet", "pipeline", "jobs"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def submit(
    cluster: Cluster, code: Path, elsewhere: Path, job: str, *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run ``ray job submit`` from a folder that has nothing to do with the code."""
    return subprocess.run(
        [
            *(str(RAY), "job", "submit", "--address", cluster.dashboard, "--submission-id", job),
            *("--working-dir", str(code), "--", sys.executable, "-m", "jobs.audit", *map(str, arguments)),
        ],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=JOB_WITHIN_S,
    )


def test_a_submitted_audit_fills_the_table(
    two_cpus: Cluster, code: Path, sample_archive: Path, model: Path, tmp_path: Path
) -> None:
    archive, out, elsewhere = sample_archive / "photos/2024/broken", tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(sample_archive / "photos/2024/launch", tmp_path / "archive")
    shutil.copytree(archive, tmp_path / "archive" / "broken")

    ran = submit(
        two_cpus, code, elsewhere, "audit-1", tmp_path / "archive", "--out", out, "--model", model, *SMALL
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
    logs = JobSubmissionClient(two_cpus.dashboard).get_job_logs("audit-1")
    result = json.loads(logs.splitlines()[-1])
    assert result["photos"] == 8
    assert result["by_status"] == {"ok": 4, "empty": 1, "truncated": 1, "unreadable": 1, "too_large": 1}
    assert len(table_rows(out)) == 8
    assert (out / "runs" / result["run_id"] / "report.html").is_file()


def test_a_submitted_audit_that_fails_makes_the_command_fail(
    two_cpus: Cluster, code: Path, model: Path, tmp_path: Path
) -> None:
    ran = submit(
        *(two_cpus, code, tmp_path, "audit-2"),
        *(tmp_path / "nowhere", "--out", tmp_path / "out", "--model", model),
    )
    assert ran.returncode != 0
    assert f"error: {tmp_path / 'nowhere'}" in ran.stdout
