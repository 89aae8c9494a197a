"""jobs.audit from and to a real S3 server."""

import json
from pathlib import Path

import pytest
from markupsafe import escape
from s3fs import S3FileSystem

from infra.s3_server import S3Server, fill
from jobs.audit import main
from pipeline import storage
from pipeline.layout import AuditLayout
from tests.e2e.harness import SMALL, Cluster, audit_here, table_rows

pytestmark = pytest.mark.e2e

# Keys are bytes of UTF-8 and no paths, whatever a URL, a shell, a query, a terminal or a page makes of them.
ODD_NAMES = (
    "it's.jpg",
    'say "cheese".jpg',
    "100%25 & a+b #1?.jpg",
    " leading space.jpg",
    "日本語 🏯.jpg",
    "cafe\u0301, decomposed.jpg",
    "UPPER.JPG",
    "line\nbreak\r.jpg",
    "tab\t, bell\a and escape\x1b[31m.jpg",
    "'; DROP TABLE photos; --.jpg",
    '"><script>alert(1)<script>.jpg',
    "$(reboot) `reboot` %s {0}.jpg",
    "%2e%2e%2f%00.jpg",
    "?versionId=1#fragment&x=.jpg",
    "* [a-z] ?.jpg",
    "right-to-left \u202egpj.jpg",
    "zero\u200bwidth \ufeff \U0001f3f4\u200d\u2620\ufe0f.jpg",
)


@pytest.fixture(scope="module")
def archive(s3: S3Server, sample_archive: Path) -> str:
    """The sample archive on S3, and photos under odd names."""
    fill(s3, sample_archive / "photos", "s3://photos/archive")
    fs = S3FileSystem()
    photo = (sample_archive / "photos/2024/launch/rocket.jpg").read_bytes()
    for name in ODD_NAMES:
        fs.call_s3("put_object", Bucket="photos", Key=f"archive/odd/{name}", Body=photo)
        # The report names what is broken.
        fs.call_s3("put_object", Bucket="photos", Key=f"archive/odd/broken {name}", Body=b"no photo")
    fs.call_s3("put_object", Bucket="photos", Key="archive/folder.jpg/within.jpg", Body=photo)
    # Some clients leave an empty object for a folder; a neighbour's prefix may begin like ours.
    fs.call_s3("put_object", Bucket="photos", Key="archive/folder.jpg/", Body=b"")
    fs.call_s3("put_object", Bucket="photos", Key="archive-of-others/photo.jpg", Body=photo)
    return "s3://photos/archive"


def test_an_archive_on_s3_is_audited_onto_s3_under_whatever_keys_and_escaped_in_the_report(
    archive: str,
    sample_archive: Path,
    model: Path,
    joined: Cluster,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    truth = json.loads((sample_archive / "truth.json").read_text())
    expected = {f"{archive}/{name}": said["expected_status"] for name, said in truth.items()}
    expected |= {f"{archive}/odd/{name}": "ok" for name in ODD_NAMES}
    expected |= {f"{archive}/odd/broken {name}": "unreadable" for name in ODD_NAMES}
    expected[f"{archive}/folder.jpg/within.jpg"] = "ok"

    ran = audit_here(
        capsys, archive, "--out", "s3://out/audit", "--model", model, "--masks", "shards", *SMALL
    )

    found = table_rows("s3://out/audit")
    assert {row["uri"]: row["status"] for row in found} == expected, ran.err
    assert len(found) == len(expected)
    listed = {item["Key"]: item["ETag"].strip('"') for item in _objects("photos", "archive/")}
    assert all(row["etag"] == listed[row["uri"].removeprefix("s3://photos/")] for row in found)
    result = ran.result
    assert result["table"] == "s3://out/audit/table"
    assert result["photos"] == len(expected)
    run = AuditLayout("s3://out/audit").run(result["run_id"])
    assert json.loads(storage.read_bytes(run.result)) == result
    report = storage.read_bytes(run.report).decode()
    assert "claims-50000x50000.png" in report
    assert str(escape("broken '; DROP TABLE photos; --.jpg")) in report
    assert "<script>alert(1)" not in report
    assert "\x1b[31m" not in ran.out + ran.err
    # The gallery read its photos again from S3.
    assert "data:image/" in report
    shards = {row["mask_shard"].partition("/")[0] for row in found if row["mask_shard"]}
    assert {f"audit/masks/{shard}" for shard in shards} == {i["Key"] for i in _objects("out", "audit/masks/")}

    # Nothing new: no Ray is needed.
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert main([archive, "--out", "s3://out/audit", "--model", str(model), *SMALL]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["photos"] == 0


def test_a_prefix_without_objects_is_refused_in_one_line(
    s3: S3Server, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["s3://photos/nothing-here", "--out", "s3://out/refused", "--model", str(model)]) == 1
    captured = capsys.readouterr()
    (error,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "nothing is at" in error
    assert captured.out == ""


def _objects(bucket: str, prefix: str) -> list[dict[str, str]]:
    return S3FileSystem().call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix)["Contents"]
