"""jobs.audit on an archive that fights back: photos that kill their decoder, keys that look like paths."""

import io
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote, unquote

import numpy as np
import pytest
from PIL import Image

from pipeline.schema import MEASUREMENTS
from tests.e2e.harness import ROOT, SMALL, Cluster, audit, table_rows

pytestmark = pytest.mark.e2e

FAULTY_DECODER = {"PYTHONPATH": str(ROOT / "tests/faulty_decoder"), "RAY_ADDRESS": ""}


def jpeg(seed: int, **options) -> bytes:
    cells = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((64, 48)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.long
def test_a_photo_that_crashes_or_hangs_the_decoder_gets_a_row_and_its_neighbours_are_audited(
    model: Path, tmp_path: Path
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    archive.mkdir()
    for number in range(40):
        (archive / f"{number:02d}.jpg").write_bytes(jpeg(number))
    (archive / "07-crasher.jpg").write_bytes(jpeg(7, comment="crash"))
    (archive / "20-hanger.jpg").write_bytes(jpeg(20, comment="hang"))

    ran = audit(archive, "--out", out, "--model", model, *SMALL, environment=FAULTY_DECODER)

    assert ran.code == 0, ran.err
    assert ran.result["by_status"] == {"ok": 40, "unreadable": 2}
    rows = table_rows(out)
    assert Counter(row["uri"] for row in rows) == Counter(map(str, archive.iterdir()))
    errors = {Path(row["uri"]).name: row["error"] for row in rows if row["status"] != "ok"}
    assert errors == {
        "07-crasher.jpg": "the decoder crashed on it (signal 11)",
        "20-hanger.jpg": "decoding took longer than 3 s",
    }
    for row in rows:
        measured = {name: row[name] for name in MEASUREMENTS.names}
        assert (measured == dict.fromkeys(MEASUREMENTS.names)) is (row["status"] != "ok")


# What AWS keeps as it is and SeaweedFS, which keeps keys as paths, refuses or rewrites.
UNTIDY_KEYS = (
    "../../../etc/passwd.jpg",
    "./a/../b.jpg",
    "a//b///c.jpg",
    "/leading.jpg",
    "back\\slash.jpg",
    "s3://photos/in-a-key.jpg",
    "n" * (1024 - len("hostile/.jpg")) + ".jpg",
    "日" * ((1024 - len("hostile/.jpg")) // 3) + ".jpg",
)


class _UntidyArchive(BaseHTTPRequestHandler):
    """The two requests of S3 that read an archive, for keys that are never taken for paths."""

    photos: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if "list-type=2" in query:
            listed = "".join(
                f"<Contents><Key>{quote(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f'<ETag>"{len(key)}"</ETag><Size>{len(body)}</Size></Contents>'
                for key, body in self.photos.items()
            )
            head = "<EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>"
            body = f"<ListBucketResult>{head}{listed}</ListBucketResult>".encode()
            self._answer(200, body, "list")
            return
        key = unquote(path).removeprefix("/photos/")
        known = key in self.photos and self.headers["If-Match"] == f'"{len(key)}"'
        self._answer(200 if known else 404, self.photos.get(key, b""), str(len(key)))

    def _answer(self, code: int, body: bytes, etag: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def untidy_archive() -> Iterator[dict[str, str]]:
    """The environment that leads to a server of ``UNTIDY_KEYS``."""
    _UntidyArchive.photos = {f"hostile/{name}": jpeg(number) for number, name in enumerate(UNTIDY_KEYS)}
    with ThreadingHTTPServer(("127.0.0.1", 0), _UntidyArchive) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "RAY_ADDRESS": "",
        }
        server.shutdown()


@pytest.mark.long
def test_a_key_that_looks_like_a_path_is_not_tidied_up(
    untidy_archive: dict[str, str], model: Path, tmp_path: Path
) -> None:
    ran = audit(
        *("s3://photos/hostile", "--out", tmp_path / "out", "--model", model, *SMALL),
        environment=untidy_archive,
    )
    assert Counter((row["uri"], row["status"], row["error"]) for row in table_rows(tmp_path / "out")) == {
        (f"s3://photos/{key}", "ok", None): 1 for key in _UntidyArchive.photos
    }, ran.err
    assert max(len(key.encode()) for key in _UntidyArchive.photos) == 1024
    assert Path(ran.result["report"]).exists()


@pytest.mark.long
def test_a_folder_named_like_a_photo_is_a_folder_and_content_outranks_the_suffix(
    model: Path, joined: Cluster, tmp_path: Path
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    (archive / "folder.jpg").mkdir(parents=True)
    (archive / "empty.png").mkdir()
    png = io.BytesIO()
    Image.open(io.BytesIO(jpeg(1))).save(png, "PNG")
    content = {
        "folder.jpg/within.jpg": (jpeg(2), "ok", "jpeg"),
        "a-png.jpg": (png.getvalue(), "ok", "png"),
        "a-jpeg.tiff": (jpeg(3), "ok", "jpeg"),
        "empty.jpg": (b"", "empty", None),
        "drawing.jpg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported", "svg"),
        "page.jpg": (b"<!doctype html><script>alert(1)</script>", "unsupported", "html"),
        "script.jpg": (b"#!/bin/sh\nrm -rf /\n", "unreadable", None),
        "line\nbreak.jpg": (jpeg(4), "ok", "jpeg"),
    }
    for name, (data, _, _) in content.items():
        (archive / name).write_bytes(data)

    ran = audit(archive, "--out", out, "--model", model, *SMALL)

    rows = {str(Path(row["uri"]).relative_to(archive)): row for row in table_rows(out)}
    assert {name: (row["status"], row["format"]) for name, row in rows.items()} == {
        name: (status, kind) for name, (_, status, kind) in content.items()
    }, ran.err
    assert Path(ran.result["report"]).exists()
