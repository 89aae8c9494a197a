"""The report of small real audits: Delta tables, Parquet listings and JPEGs made here."""

import io
import json
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from PIL import Image

from jobs.report import main
from pipeline import report
from pipeline.layout import AuditLayout
from pipeline.report import MAX_PROBLEMS, overlay
from pipeline.report import build_report as build
from pipeline.schema import AUDIT_TABLE, FAILURES_TABLE, LISTING
from pipeline.storage import local_etag
from pipeline.view import current_view

NOW = datetime(2026, 3, 1, 6, 0, tzinfo=UTC)


def jpeg(width=96, height=64):
    shades = np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(shades).save(buffer, "JPEG")
    return buffer.getvalue()


def mask_png(share, width=96, height=64):
    mask = np.zeros((height, width), bool)
    mask[:, : round(width * share)] = True
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


class Audit:
    """An audit under construction: photos in SOURCE, rows and runs in OUT."""

    def __init__(self, folder: Path):
        self.source, self.out = folder / "photos", folder / "audit"
        self.layout = AuditLayout(str(self.out))
        self.source.mkdir()
        self.rows: list[dict] = []

    def listed(self, name, data=None):
        """A photo of the archive; without ``data`` it is gone by the time of the report."""
        etag = "e1"
        if data is not None:
            (self.source / name).write_bytes(data)
            etag = local_etag((self.source / name).stat())
        uri, size = f"{self.source}/{name}", len(data or b"")
        return {"uri": uri, "etag": etag, "size_bytes": size, "modified_at": NOW}

    def row(self, listed, status="ok", digest="a1", share=0.5, focus="shallow_depth", **more):
        """An audit row of a listed photo, measured where it is ok."""
        verdict = "sharp" if share < 0.1 else "blurred" if share > 0.9 else "partly_blurred"
        measured = {
            "blurred_fraction": share,
            "subject_blurred_fraction": share,
            "blur_kind": "motion" if share >= 0.05 else None,
            "kind_confidence": 0.93 if share >= 0.05 else None,
            "verdict": verdict,
            "focus": focus,
            "mask": mask_png(share),
            "mask_width": 96,
            "mask_height": 64,
        }
        provenance = {"model_digest": "m1", "audit_digest": digest, "run_id": "r1", "audited_at": NOW}
        row = {**listed, "status": status, **provenance, **(measured if status == "ok" else {}), **more}
        self.rows.append({name: row.get(name) for name in AUDIT_TABLE.names})

    def run(
        self,
        run_id,
        listing,
        *,
        started="2026-03-01T06:00:00+00:00",
        complete=True,
        digest="a1",
        rows_per_shard=50_000,
        folder="",
        working_size=640,
    ):
        run = self.layout.run(run_id)
        Path(run.listing).mkdir(parents=True)
        for start in range(0, max(len(listing), 1), rows_per_shard):
            rows = pa.Table.from_pylist(listing[start : start + rows_per_shard], LISTING)
            pq.write_table(rows, f"{run.listing}/{start}.parquet")
        settings = {
            "run_id": run_id,
            "started_at": started,
            "source": str(self.source / folder),
            "audit_digest": digest,
            "model_digest": "m1",
            "model": "bdnet-resnet18",
            "working_size": working_size,
            "listing_complete": complete,
            "skipped_by_suffix": {".xml": 7},
        }
        Path(run.settings).write_text(json.dumps(settings))

    def report(self):
        """Commit the rows, write the report, and return its summary and its text."""
        if self.rows:
            write_deltalake(self.layout.table, pa.Table.from_pylist(self.rows, AUDIT_TABLE))
        destination = self.out / "report.html"
        summary = build(str(self.out), str(destination))
        return summary, destination.read_text()


@pytest.fixture
def audit(tmp_path):
    return Audit(tmp_path)


def test_counts_are_of_the_listed_photos(audit):
    photos = [audit.listed(f"{n}.jpg", jpeg()) for n in range(4)]
    audit.row(photos[0], share=0.02, focus="all_sharp")
    audit.row(photos[1], share=0.5)
    audit.row(photos[2], share=0.95, focus="no_sharp_region")
    audit.row(photos[3], status="truncated", error="it ends in the middle of a scan")
    audit.run("r1", photos)
    summary, _ = audit.report()
    assert (summary.run_id, summary.photos) == ("r1", 4)
    assert summary.by_status == {"ok": 3, "truncated": 1}
    assert summary.by_verdict == {"sharp": 1, "partly_blurred": 1, "blurred": 1}
    assert summary.by_focus == {"all_sharp": 1, "shallow_depth": 1, "no_sharp_region": 1}


def test_gone_photos_older_versions_and_other_digests_are_not_in_view(audit):
    kept = audit.listed("kept.jpg", jpeg())
    audit.row(kept, share=0.5)
    audit.row(kept, share=0.99, digest="another model")
    audit.row({**kept, "etag": "e0"}, share=0.98)
    audit.row(audit.listed("deleted since.jpg", jpeg()), share=0.97)
    audit.run("r1", [kept])
    summary, text = audit.report()
    assert summary.by_verdict == {"partly_blurred": 1}
    assert "deleted since" not in text
    assert "50.0%" in text
    assert "97.0%" not in text


def test_the_latest_complete_listing_counts_even_if_a_partial_one_is_newer(audit):
    photos = [audit.listed(f"{n}.jpg", jpeg()) for n in range(3)]
    audit.run("old", photos[:1], started="2026-02-01T06:00:00+00:00")
    audit.run("whole", photos[:2], started="2026-03-01T06:00:00+00:00")
    audit.run("interrupted", photos, started="2026-03-02T06:00:00+00:00", complete=False)
    summary, text = audit.report()
    assert (summary.run_id, summary.photos) == ("whole", 2)
    assert "Partial listing" not in text


def test_moments_are_compared_across_time_zones(audit):
    audit.run("earlier", [], started="2026-03-01T08:00:00+05:00")
    audit.run("later", [], started="2026-03-01T04:00:00+00:00")
    assert current_view(audit.layout).run.run_id == "later"


def test_a_partial_listing_is_labelled(audit):
    audit.run("r1", [audit.listed("a.jpg", jpeg())], complete=False)
    summary, text = audit.report()
    assert summary.photos == 1
    assert "Partial listing" in text


def test_photos_without_a_row_count_by_their_latest_failure(audit):
    denied, again, new = (audit.listed(name, jpeg()) for name in ("denied.jpg", "again.jpg", "new.jpg"))
    audit.run("r1", [denied, again, new])
    audit.row(again)  # it failed once and has its row now
    failures = [
        {**denied, "status": "timeout", "error": "slow", "run_id": "r0", "failed_at": NOW.replace(hour=1)},
        {**denied, "status": "denied", "error": "403", "run_id": "r1", "failed_at": NOW.replace(hour=2)},
        {**again, "status": "throttled", "error": "503", "run_id": "r0", "failed_at": NOW.replace(hour=1)},
    ]
    write_deltalake(audit.layout.failures, pa.Table.from_pylist(failures, FAILURES_TABLE))
    summary, text = audit.report()
    assert summary.by_status == {"ok": 1, "denied": 1, "not_audited": 1}
    assert "2 photos are not yet audited" in text
    assert "<td>403</td>" in text


def test_an_audit_without_a_table_yet_has_all_its_photos_to_do(audit):
    audit.run("r1", [audit.listed("a.jpg", jpeg())])
    # What a crash before the first commit leaves: staged files and no log.
    (audit.out / "table").mkdir()
    (audit.out / "table" / "staged.parquet").write_bytes(b"")
    summary, _ = audit.report()
    assert summary.by_status == {"not_audited": 1}


def test_an_audit_of_nothing_but_broken_files_lists_them_with_reasons(audit):
    broken = [audit.listed(name, data) for name, data in [("text.jpg", b"hello"), ("void.jpg", b"")]]
    audit.row(broken[0], status="unreadable", error="not an image: b'hello'")
    audit.row(broken[1], status="empty")
    audit.run("r1", broken)
    summary, text = audit.report()
    assert summary.by_status == {"unreadable": 1, "empty": 1}
    assert summary.by_verdict == {}
    assert "text.jpg" in text
    assert "not an image: b&#39;hello&#39;" in text
    assert "<svg" not in text


def test_only_so_many_broken_files_are_listed_and_the_rest_are_counted(audit):
    broken = [audit.listed(f"{n:04}.jpg") for n in range(MAX_PROBLEMS + 3)]
    for listed in broken:
        audit.row(listed, status="empty")
    audit.run("r1", broken)
    _, text = audit.report()
    assert f"{MAX_PROBLEMS - 1:04}.jpg" in text
    assert f"{MAX_PROBLEMS:04}.jpg" not in text
    assert "and 3 more" in text


def test_files_skipped_by_suffix_are_counted(audit):
    audit.run("r1", [])
    _, text = audit.report()
    assert re.search(r"\.xml</code></td><td class=\"number\">7<", text)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("<script>alert(1)<script>.jpg", "&lt;script&gt;alert(1)&lt;script&gt;.jpg"),
        ("\" onerror='x' .jpg", "&#34; onerror=&#39;x&#39; .jpg"),
        ("two\nlines.jpg", r"two\nlines.jpg"),
        ("reversed\u202egpj.exe.jpg", r"reversed\u202egpj.exe.jpg"),
        ("javascript:alert(1).jpg", "javascript:alert(1).jpg"),
        ("it's \\n'; --.jpg", "it&#39;s \\n&#39;; --.jpg"),
        ("{{ 7 * 7 }}.jpg", "{{ 7 * 7 }}.jpg"),
    ],
)
def test_hostile_names_are_shown_as_text(audit, name, shown):
    photo, broken = audit.listed(name, jpeg()), audit.listed(f"broken {name}", b"x")
    audit.row(photo, share=0.8, camera="<b>Camera</b>")
    audit.row(broken, status="unreadable", error=f"cannot read {name}")
    audit.run("r1", [photo, broken])
    _, text = audit.report()
    assert f'<div class="name">{shown}</div>' in text
    assert f"broken {shown}" in text
    assert text.count("data:image/jpeg;base64,") == 2  # the SQL found the row again, whatever its quotes
    assert not re.search(r"""<script|<b>|href=|\son\w+=['"]""", text)


def test_the_file_needs_nothing_from_elsewhere(audit):
    photo = audit.listed("a.jpg", jpeg())
    audit.row(photo, share=0.8)
    audit.run("r1", [photo])
    _, text = audit.report()
    assert "<svg" in text
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?://|//\w+\.\w|<script|<link|@import|url\(", without_namespaces)
    assert "default-src 'none'" in text


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (None, "no longer there"),
        (jpeg(200, 100), "has changed since it was audited"),
        (b"x" * len(jpeg()), "has changed since it was audited"),
    ],
    ids=["gone", "replaced by a larger one", "same size but no photo"],
)
def test_a_photo_that_is_not_what_was_audited_is_said_to_be_so(audit, now, said):
    photo = audit.listed("a.jpg", jpeg())
    audit.row(photo, share=0.8)
    audit.run("r1", [photo])
    path = audit.source / "a.jpg"
    path.unlink() if now is None else path.write_bytes(now)
    summary, text = audit.report()
    assert summary.by_verdict == {"partly_blurred": 1}
    assert said in text
    assert "data:image" not in text


def test_a_damaged_mask_costs_its_overlay_alone(audit):
    photos = [audit.listed(f"{n}.jpg", jpeg()) for n in range(2)]
    audit.row(photos[0], share=0.8, mask=b"no PNG")
    audit.row(photos[1], share=0.7)
    audit.run("r1", photos)
    _, text = audit.report()
    assert "Its mask in the table can&#39;t be read (UnidentifiedImageError)." in text
    assert len(re.findall("data:image", text)) == 3


def test_the_gallery_is_bounded_and_starts_with_the_most_blurred(audit, monkeypatch):
    monkeypatch.setattr(report, "MOST_BLURRED", 2)
    monkeypatch.setattr(report, "SHARPEST", 0)
    photos = [audit.listed(f"{n}.jpg", jpeg()) for n in range(5)]
    for n, photo in enumerate(photos):
        audit.row(photo, share=0.2 + n / 10)
    audit.run("r1", photos)
    _, text = audit.report()
    assert re.findall(r'class="name">(\w+\.jpg)', text) == ["4.jpg", "3.jpg"]


def test_what_is_shown_does_not_depend_on_how_the_listing_is_cut(audit, monkeypatch):
    for gallery, size in (("MOST_BLURRED", 8), ("MISSED", 3), ("SHARPEST", 1)):
        monkeypatch.setattr(report, gallery, size)
    photos = [audit.listed(f"{n:02}.jpg") for n in range(30)]
    for n, photo in enumerate(photos):
        # Many are equal: then the name decides.
        if n % 7:
            focus = "suspected_miss" if n % 2 else "shallow_depth"
            audit.row(photo, share=[0.02, 0.5, 0.95][n % 3], focus=focus)
        elif n:
            audit.row(photo, status=["empty", "truncated"][n % 2])
    audit.run("r1", photos)
    summary, whole = audit.report()
    assert len(re.findall(r'class="name">', whole)) == 8 + 3 + 1
    shutil.rmtree(audit.layout.run("r1").root)
    audit.rows = []
    audit.run("r1", photos[::-1], rows_per_shard=4)
    again, text = audit.report()
    assert again == summary
    written = re.compile(r"report written [^.]*")
    assert written.sub("", text) == written.sub("", whole)


def test_several_listings_in_one_view_are_named_with_what_they_were_audited_with(audit):
    (audit.source / "2024").mkdir()
    old, new = audit.listed("old.jpg", jpeg()), audit.listed("2024/new.jpg", jpeg())
    audit.row(old, digest="a1")
    audit.row(new, digest="a2", share=0.6)
    audit.row(new, digest="a1", share=0.7)
    audit.run("all", [old, new], started="2026-03-01T06:00:00+00:00")
    audit.run(
        "part", [new], started="2026-03-02T06:00:00+00:00", folder="2024", digest="a2", working_size=320
    )
    summary, text = audit.report()
    assert (summary.run_id, summary.photos, summary.by_status) == ("part", 2, {"ok": 2})
    assert f"<title>Blur in {audit.source}</title>" in text
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td>.*?<td>(\d+) px</td>", text)
    assert rows == [
        (f"{audit.source}/2024", "2026-03-02 06:00 UTC", "320"),
        (f"{audit.source}", "2026-03-01 06:00 UTC", "640"),
    ]
    assert "at 320 or 640 pixels" in text
    assert re.findall(r'class="name">(.*?)<', text) == ["2024/new.jpg", "old.jpg"]
    assert "60.0%" in text
    assert "70.0%" not in text
    assert re.search(r"\.xml</code></td><td class=\"number\">7<", text)  # the outer listing's count has both


def test_overlay_tints_and_outlines_the_blurred_pixels_only():
    pixels = np.full((8, 8, 3), 100, np.uint8)
    mask = np.zeros((8, 8), bool)
    mask[:, :4] = True
    drawn = overlay(pixels, mask)
    assert (drawn[:, 4:] == 100).all()
    outline, inside = drawn[:, 3], drawn[:, :3]
    assert (outline == outline[0]).all()
    assert (inside == inside[0, 0]).all()  # the frame of the photo is not outlined
    assert len({(100, 100, 100), tuple(outline[0]), tuple(inside[0, 0])}) == 3
    assert (pixels == 100).all()


def test_the_command_writes_both_files_and_prints_the_result_last(audit, capsys, tmp_path):
    audit.run("r1", [audit.listed("a.jpg", jpeg())])
    assert main([str(audit.out), "--out", str(tmp_path / "report")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == json.loads((tmp_path / "report" / "result.json").read_text())
    assert json.loads(last) == {
        "report": str(tmp_path / "report" / "report.html"),
        "run_id": "r1",
        "photos": 1,
        "by_status": {"not_audited": 1},
        "by_verdict": {},
        "by_focus": {},
    }
    assert (tmp_path / "report" / "report.html").read_text().startswith("<!DOCTYPE html>")


def one_line_error(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert captured.err.endswith(f"{errors[-1]}\n")
    return errors[-1]


def test_credentials_are_refused_before_anything_is_said(capsys, tmp_path):
    uri = "s3://KEY:SEKRET@bucket/audit"
    for arguments in ([uri, "--out", str(tmp_path)], [str(tmp_path), "--out", uri]):
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert "holds credentials" in captured.err
        assert "SEKRET" not in captured.err + captured.out


def test_a_folder_that_is_no_audit_is_refused_in_one_line(capsys, tmp_path):
    assert main([str(tmp_path), "--out", str(tmp_path / "report")]) == 1
    assert "no audit at" in one_line_error(capsys)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("settings", ["", "[]", '{"run_id": "r1"}', "\xff"])
def test_settings_that_are_none_are_refused_by_name(audit, capsys, settings):
    audit.run("r1", [])
    Path(audit.layout.run("r1").settings).write_text(settings, encoding="latin-1")
    assert main([str(audit.out), "--out", str(audit.out)]) == 1
    assert "r1/settings.json" in one_line_error(capsys)


def test_a_table_whose_files_were_lost_is_an_error_and_no_report(audit, capsys):
    photo = audit.listed("a.jpg", jpeg())
    audit.row(photo)
    audit.run("r1", [photo])
    audit.report()
    for file in Path(audit.layout.table).glob("*.parquet"):
        file.unlink()
    assert main([str(audit.out), "--out", str(audit.out / "again")]) == 1
    assert "cannot read the table" in one_line_error(capsys)
    assert not (audit.out / "again").exists()
