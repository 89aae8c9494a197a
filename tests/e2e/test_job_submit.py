"""`ray job submit` brings the code to a cluster and runs it there."""

import json
import shutil
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from tests.e2e.harness import SMALL, Cluster, copy_code, submit, table_rows

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_code(tmp_path_factory.mktemp("code"))


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

    assert ran.code == 0, ran.out + ran.err
    logs = JobSubmissionClient(two_cpus.dashboard).get_job_logs("audit-1")
    result = json.loads(logs.splitlines()[-1])
    assert result["photos"] == 8
    assert result["by_status"] == {"ok": 4, "empty": 1, "truncated": 1, "unreadable": 1, "too_large": 1}
    assert len(table_rows(out)) == 8
    assert (out / "runs" / result["run_id"] / "report.html").is_file()


@pytest.mark.long
def test_a_submitted_audit_that_fails_makes_the_command_fail_and_says_why_in_the_jobs_api(
    two_cpus: Cluster, code: Path, model: Path, tmp_path: Path
) -> None:
    ran = submit(
        *(two_cpus, code, tmp_path, "audit-2"),
        *(tmp_path / "nowhere", "--out", tmp_path / "out", "--model", model),
    )
    reason = f"error: {tmp_path / 'nowhere'}"
    assert ran.code == 1
    assert reason in ran.out
    job = two_cpus.api("/api/jobs/audit-2")
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 1)
    assert reason in job["message"]
    assert two_cpus.api("/api/jobs/audit-2/logs")["logs"].splitlines()[-1].startswith(reason)
