"""The steps between a listing and the files that a driver commits, without Ray."""

import gc
import io
import json
import os
import struct
import tarfile
import threading
import time
import weakref
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bdnet import photo
from bdnet.card import read_card
from bdnet.memory import MemoryBudget
from bdnet.model import load, save
from bdnet.networks import build
from bdnet.photo import Photo, decoder_version
from pipeline import decoding, steps, storage
from pipeline.fetch import Fetched
from pipeline.layout import AuditLayout
from pipeline.schema import AUDIT_TABLE, FAILURES_TABLE, LISTING, MEASUREMENTS
from pipeline.steps import (
    ATTEMPTS,
    TIMED,
    Detector,
    Provenance,
    encode_mask,
    read_and_decode,
    stage_rows,
)

PROVENANCE = Provenance("m1", "a1", "r1")
# Names say the (width, height) of the photo at working size.
SIZES = {"64x48": (64, 48), "48x64": (48, 64), "64x64": (64, 64), "40x30": (40, 30)}
STATUS = {"text.jpg": "unreadable", "empty.jpg": "empty", "cut.jpg": "truncated", "raw.jpg": "unsupported"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A network that was never trained: a mask of something, the same each time."""
    folder = str(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    save(build("bdnet-resnet18"), folder, {"arch": "bdnet-resnet18"})
    return folder


def jpeg(width, height, seed=0):
    # Coarse noise: no two photos look alike.
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((width, height)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Photos of mixed shapes between broken ones, gone ones and changed ones; a listing of them."""
    folder = tmp_path_factory.mktemp("archive")
    for number in range(3):
        for name, (width, height) in SIZES.items():
            (folder / f"{number}-{name}.jpg").write_bytes(jpeg(width, height, seed=number))
    (folder / "text.jpg").write_text("no photo")
    (folder / "empty.jpg").touch()
    whole = jpeg(200, 200)
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "raw.jpg").write_bytes(b"\0\0\0\x18ftypcrx " + bytes(12))
    rows = []
    for path in sorted(folder.iterdir()):
        etag = storage.local_etag(path.stat())
        rows.append({"uri": str(path), "etag": etag, "size_bytes": path.stat().st_size, "modified_at": None})
    rows.insert(3, {**rows[0], "uri": str(folder / "gone.jpg")})
    rows.insert(6, {**rows[0], "etag": "another"})
    return pa.Table.from_pylist(rows, schema=LISTING)


@pytest.fixture(scope="module")
def decoded(archive):
    table = read_and_decode(archive, 64, decoder_version())
    return table


def test_pixels_are_let_go_once_they_are_in_the_table(archive, monkeypatch):
    # A column made of memoryviews kept every photo that a worker ever decoded: 0.2 MB each at 320 pixels.
    seen = []

    def decode(data, size, limits):
        photo = steps_decode(data, size, limits)
        if photo.pixels is not None:
            seen.append(weakref.ref(photo.pixels))
        return photo

    steps_decode = steps.decode
    monkeypatch.setattr(steps, "decode", decode)
    read_and_decode(archive, 64, decoder_version())
    gc.collect()
    assert len(seen) > 10
    assert [reference for reference in seen if reference() is not None] == []


@pytest.fixture(scope="module")
def detected(decoded, model):
    return Detector(model, read_card(model).digest, threads=1)(decoded)


def expected_status(row):
    if row["etag"] == "another":
        return "changed"
    return {**STATUS, "gone.jpg": "missing"}.get(os.path.basename(row["uri"]), "ok")


def test_every_photo_has_one_row_in_order_with_its_status(archive, decoded):
    assert decoded.select(LISTING.names) == archive
    rows = decoded.to_pylist()
    assert [row["status"] for row in rows] == [expected_status(row) for row in rows]
    for row in rows:
        is_ok = row["status"] == "ok"
        assert (row["error"] is None) is is_ok
        assert (row["pixels"] is not None) is is_ok


def test_pixels_are_those_of_the_photo(archive, decoded):
    row = next(row for row in decoded.to_pylist() if row["uri"].endswith("1-64x48.jpg"))
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(row["pixels_height"], row["pixels_width"], 3)
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(row["uri"])))
    assert (row["width"], row["height"], row["format"]) == (64, 48, "jpeg")


def test_the_working_size_bounds_the_long_side_and_enlarges_nothing(archive):
    table = read_and_decode(archive, 48, decoder_version())
    sizes = {
        (row["width"], row["height"]): (row["pixels_width"], row["pixels_height"])
        for row in table.to_pylist()
        if row["status"] == "ok"
    }
    assert sizes == {(64, 48): (48, 36), (48, 64): (36, 48), (64, 64): (48, 48), (40, 30): (40, 30)}


def test_batches_of_mixed_shapes_keep_each_photo_with_its_own_result(decoded, detected, model):
    assert detected.select(LISTING.names) == decoded.select(LISTING.names)
    alone = load(model)
    for row in detected.to_pylist():
        if row["status"] != "ok":
            continue
        width, height = SIZES[os.path.basename(row["uri"])[2:-4]]
        assert (row["mask_width"], row["mask_height"]) == (width, height)
        one = alone.detect(row["uri"], 64)
        # Batched and single arithmetic may differ in the last bits, photos differ by far more.
        assert row["uncertainty"] == pytest.approx(one.uncertainty, abs=2e-3)
        assert row["blurred_fraction"] == pytest.approx(one.blurred_fraction, abs=0.02)
        with Image.open(io.BytesIO(row["mask"])) as mask:
            assert np.asarray(mask).mean() == pytest.approx(row["blurred_fraction"], abs=1e-9)
    fractions = [row["uncertainty"] for row in detected.to_pylist() if row["status"] == "ok"]
    assert len(set(fractions)) == len(fractions)  # else a mix-up would not show


def test_photos_larger_than_the_model_is_made_for_come_in_smaller_batches(model):
    detector, made_for = Detector(model, read_card(model).digest, threads=1), read_card(model).working_size
    detector._model.batch = 16  # as on a GPU
    sizes = (made_for // 2, made_for, 2 * made_for, 8 * made_for)
    assert [detector._photos_at_once(size // 2, size) for size in sizes] == [16, 16, 4, 1]


def test_what_is_not_ok_is_never_measured(detected):
    for row in detected.to_pylist():
        measured = [
            row[name]
            for name in MEASUREMENTS.names
            if name not in ("mask_shard", "blur_kind", "kind_confidence")
        ]
        assert all((value is not None) is (row["status"] == "ok") for value in measured)
        assert row["mask_shard"] is None


def test_pixels_end_with_detection(detected):
    assert "pixels" not in detected.column_names
    assert "subject_area" not in detected.column_names


def test_a_block_without_any_photo_that_can_be_read_passes(decoded, model):
    broken = decoded.filter(pc.not_equal(decoded["status"], "ok"))
    assert (
        Detector(model, read_card(model).digest, threads=1)(broken)["status"].to_pylist()
        == broken["status"].to_pylist()
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (48, 64)])
def test_a_mask_is_one_bit_per_pixel_and_comes_back(shape):
    mask = np.random.default_rng(0).random(shape) > 0.5
    with Image.open(io.BytesIO(encode_mask(mask))) as image:
        assert image.mode == "1"
        np.testing.assert_array_equal(np.asarray(image), mask)


def staged_rows(staged, out):
    """(target, rows of the file) of each staged file."""
    folders = {"table": AuditLayout(out).table, "failures": AuditLayout(out).failures}
    return {
        row["target"]: pq.read_table(f"{folders[row['target']]}/{row['path']}") for row in staged.to_pylist()
    }


def test_final_rows_are_staged_for_the_table_and_retryable_ones_for_the_failures(detected, tmp_path):
    staged = stage_rows(detected, str(tmp_path), PROVENANCE, mask_shards=False)
    files = staged_rows(staged, str(tmp_path))
    assert files["table"].schema == AUDIT_TABLE
    assert files["failures"].schema == FAILURES_TABLE
    assert sorted(files["failures"]["status"].to_pylist()) == ["changed", "missing"]
    assert set(files["table"]["status"].to_pylist()) == {"ok", *STATUS.values()}
    uris = [uri for file in files.values() for uri in file["uri"].to_pylist()]
    assert sorted(uris) == sorted(detected["uri"].to_pylist())
    assert set(files["table"]["run_id"].to_pylist()) == set(files["failures"]["run_id"].to_pylist()) == {"r1"}
    assert set(files["table"]["mask_shard"].to_pylist()) == {None}
    assert not (tmp_path / "masks").exists()


def test_the_driver_is_told_what_each_file_holds(detected, tmp_path):
    told = {row["target"]: row for row in stage_rows(detected, str(tmp_path), PROVENANCE, False).to_pylist()}
    assert told["failures"]["rows"] == 2
    assert told["table"]["rows"] == len(detected) - 2
    assert json.loads(told["table"]["by_status"]) == {"ok": 12, **dict.fromkeys(STATUS.values(), 1)}
    assert json.loads(told["failures"]["by_status"]) == {"changed": 1, "missing": 1}
    assert sum(json.loads(told["table"]["by_verdict"]).values()) == 12
    assert json.loads(told["failures"]["by_verdict"]) == {}


def test_the_driver_is_told_once_how_long_each_step_took(detected, tmp_path):
    told = stage_rows(detected, str(tmp_path), PROVENANCE, False).to_pylist()
    seconds, again = (json.loads(row["seconds"]) for row in told)
    assert again == {}
    assert seconds.keys() == {"fetch", "decode", "detect", "encode", "idle", "stage"}
    assert all(seconds.values())
    assert seconds["decode"] == pytest.approx(pc.sum(detected["decode_s"]).as_py())


def test_nothing_is_staged_of_nothing(detected, tmp_path):
    only_final = detected.filter(pc.equal(detected["status"], "ok"))
    staged = stage_rows(only_final, str(tmp_path), PROVENANCE, False)
    assert staged["target"].to_pylist() == ["table"]
    assert not (tmp_path / "failures").exists()


def test_mask_shards_hold_the_masks_under_the_names_in_the_rows(detected, tmp_path):
    staged = stage_rows(detected, str(tmp_path), PROVENANCE, mask_shards=True)
    named = 0
    for row in staged_rows(staged, str(tmp_path))["table"].to_pylist():
        if row["mask"] is None:
            assert row["mask_shard"] is None
            continue
        shard, member = row["mask_shard"].split("/")
        with tarfile.open(tmp_path / "masks" / shard) as tar:
            assert tar.extractfile(member).read() == row["mask"]
            named += 1
            assert len(tar.getnames()) == len(set(tar.getnames())) == 12
    assert named == 12


def test_a_hostile_name_stays_a_plain_member_of_the_tar(detected, tmp_path):
    row = next(row for row in detected.to_pylist() if row["status"] == "ok")
    evil = [
        {**row, "uri": uri}
        for uri in ("s3://b/../../etc/x y\n.jpg", "s3://b/x.jpg", "t3://b/x.jpg", "a" * 300)
    ]
    table = pa.Table.from_pylist(evil, schema=detected.schema)
    stage_rows(table, str(tmp_path), PROVENANCE, mask_shards=True)
    [shard] = (tmp_path / "masks").iterdir()
    with tarfile.open(shard) as tar:
        names = tar.getnames()
    assert names[:3] == ["00000-x_y_.png", "00001-x.png", "00002-x.png"]
    assert len(names[3]) < 100


def test_a_model_that_was_replaced_in_mid_run_is_refused(model):
    with pytest.raises(ValueError, match="another model than when the job began"):
        Detector(model, "0" * 64, threads=1)


def test_an_object_over_the_limit_is_too_large_without_being_read(tmp_path):
    row = {"uri": str(tmp_path / "absent.jpg"), "etag": "1", "size_bytes": 600 * 2**20}
    decoded = read_and_decode(pa.Table.from_pylist([row], schema=LISTING), 64, decoder_version())
    assert decoded["status"].to_pylist() == ["too_large"]


def test_a_node_with_another_decoder_writes_no_rows(archive, monkeypatch):
    drivers = decoder_version()
    monkeypatch.delitem(photo._OPENERS, "heic", raising=False)
    wrong = f"{drivers} without HEIC, the driver {drivers}: install the same packages on all"
    with pytest.raises(ValueError, match=wrong):
        read_and_decode(archive, 64, drivers)


def test_a_side_that_fits_no_column_leaves_the_neighbours_their_rows(archive, tmp_path):
    # A PNG whose header claims 2³² − 1 columns.
    path = tmp_path / "wide.png"
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + struct.pack(">IIBBBBB", 2**32 - 1, 1, 8, 2, 0, 0, 0), b"IDAT"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(content)
    etag = storage.local_etag(path.stat())
    row = {"uri": str(path), "etag": etag, "size_bytes": path.stat().st_size, "modified_at": None}
    photos = pa.concat_tables([archive, pa.Table.from_pylist([row], schema=LISTING)])
    decoded = read_and_decode(photos, 64, decoder_version())
    assert len(decoded) == len(photos)
    last = decoded.slice(len(archive)).to_pylist()[0]
    assert (last["status"], last["width"], last["height"]) == ("too_large", None, None)
    assert "4294967295×1" in last["error"]


def test_a_task_that_runs_again_goes_carefully_and_gives_the_same_rows(archive, decoded, monkeypatch):
    monkeypatch.setattr(decoding, "attempt", lambda: 1)
    carefully = read_and_decode(archive, 64, decoder_version())
    untimed = [name for name in decoded.schema.names if name not in TIMED]
    assert carefully.select(untimed).equals(decoded.select(untimed))


def test_photos_for_which_careful_decoding_has_no_time_left_are_for_the_next_run(archive, monkeypatch):
    monkeypatch.setattr(decoding, "attempt", lambda: 1)
    monkeypatch.setattr(steps, "CAREFUL_SECONDS", 0.0)
    carefully = read_and_decode(archive, 64, decoder_version())
    assert carefully.select(LISTING.names) == archive
    assert set(carefully["status"].to_pylist()) == {"timeout"}


def test_a_block_whose_workers_die_again_and_again_is_left_for_the_next_run(archive, monkeypatch):
    monkeypatch.setattr(decoding, "attempt", lambda: ATTEMPTS)
    given_up = read_and_decode(archive, 64, decoder_version())
    assert given_up.select(LISTING.names) == archive
    assert set(given_up["status"].to_pylist()) == {"timeout"}
    assert set(given_up["error"].to_pylist()) == {f"the workers that read it were killed {ATTEMPTS} times"}


def test_files_in_memory_are_bounded_however_many_threads_fetch(tmp_path, monkeypatch):
    held, most, lock = 0, 0, threading.Lock()

    def count(change):
        nonlocal held, most
        with lock:
            held += change
            most = max(most, held)

    def fetch_slowly(uri, etag, most):
        assert most == 400
        count(400)
        time.sleep(0.01)
        return Fetched(b"x")

    def decode_slowly(data, working_size, limits):
        time.sleep(0.01)
        count(-400)
        return Photo("unreadable", "no photo")

    monkeypatch.setattr(steps, "_FETCHED", MemoryBudget(1000))
    monkeypatch.setattr(steps, "fetch", fetch_slowly)
    monkeypatch.setattr(steps, "decode", decode_slowly)
    rows = [{"uri": f"{number}.jpg", "etag": "1", "size_bytes": 400} for number in range(20)]
    decoded = read_and_decode(pa.Table.from_pylist(rows, schema=LISTING), 64, decoder_version())
    assert decoded["uri"].to_pylist() == [row["uri"] for row in rows]
    assert most == 800


def test_empty_photos_do_not_wait_for_each_other_and_one_of_unknown_size_waits_for_room(monkeypatch):
    asked = []

    class Budget(MemoryBudget):
        def reserve(self, size):
            asked.append(size)
            return super().reserve(size)

    monkeypatch.setattr(steps, "_FETCHED", Budget(steps.LIMITS.max_bytes))
    monkeypatch.setattr(steps, "fetch", lambda uri, etag, most: Fetched(None, "missing", f"of {most} bytes"))
    uris = ["/archive/a.jpg", "s3://photos/a.jpg", "https://photos/a.jpg"]
    rows = [{"uri": uri, "etag": "1", "size_bytes": 0} for uri in uris]
    decoded = read_and_decode(pa.Table.from_pylist(rows, schema=LISTING), 64, decoder_version())
    assert sorted(asked) == [0, 0, steps.LIMITS.max_bytes]
    assert decoded["error"].to_pylist() == ["of 0 bytes", "of 0 bytes", f"of {steps.LIMITS.max_bytes} bytes"]
