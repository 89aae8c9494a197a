import errno
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

import bdnet.model
import bdnet.networks
from bdnet import metrics
from bdnet.card import read_card
from pipeline import dataset, evaluation, scoring
from pipeline.schema import PATCHES
from tests.pipeline.test_dataset import HALF, encoded, refused, write_dataset

DATA = os.environ.get("BDNET_DATA")
needs_data = pytest.mark.skipif(
    not DATA, reason="needs BlurRaw: set BDNET_DATA to the folder that holds blurraw/ and peer_maps/"
)
TRUTH = HALF > 0


@pytest.fixture
def folder(tmp_path):
    """A dataset and, beside it, a right map for each of its photos."""
    (tmp_path / "data").mkdir()
    (tmp_path / "maps").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"maps/{name}.png").write_bytes(encoded(HALF))
    write_dataset(tmp_path / "data", "name,kind,split\nb,motion,test\na,defocus,test\n")
    return tmp_path


def write_patches(folder, rows):
    """One shard of (photo, kind, split) rows; each is a 4×3 patch with HALF for its mask."""
    folder.mkdir(exist_ok=True)
    image = encoded(np.full((3, 4, 3), 90, np.uint8))
    window = {"cut": "blurdb2", "left": 0, "top": 0, "width": 4, "height": 3, "blurred_fraction": 0.5}
    patches = [
        {"photo": p, "kind": k, "split": s, "image": image, "mask": encoded(HALF), **window}
        for p, k, s in rows
    ]
    pq.write_table(pa.Table.from_pylist(patches, PATCHES), folder / "00000.parquet")
    (folder / "dataset.json").write_text('{"shards": {"00000.parquet": ""}}')
    return str(folder)


def write_model(folder):
    torch.manual_seed(0)
    bdnet.model.save(bdnet.networks.build("bdnet-resnet18"), str(folder), {"arch": "bdnet-resnet18"})
    return str(folder)


def item(soft_map=HALF, mask=HALF):
    row = {
        "name": "a",
        "kind": "motion",
        "soft_map": encoded(soft_map),
        "mask": encoded(mask),
        "where": "a.png",
    }
    return pa.Table.from_pylist([row], scoring.ITEM)


def scored(soft_map, mask=HALF, threshold="0.5"):
    return scoring.score_items(item(soft_map, mask), scoring.given_map, threshold).to_pylist()[0]


# One item


def test_grey_127_of_a_map_is_sharp_and_128_is_blurred():
    row = scored(np.where(HALF > 0, 128, 127).astype(np.uint8))
    assert (row["tn"], row["fp"], row["fn"], row["tp"]) == (6, 0, 0, 6)


def test_a_probability_of_one_half_is_blurred():
    matrix, mae = scoring.score(np.full(TRUTH.shape, 0.5, np.float32), TRUTH, "0.5")
    assert matrix.tolist() == [[0, 6], [0, 6]]
    assert mae == 0.5


def test_mae_is_that_of_the_soft_map_and_not_of_the_thresholded_one():
    assert scored(np.where(HALF > 0, 204, 51).astype(np.uint8))["mae"] == pytest.approx(0.2)


def test_otsu_finds_two_levels_that_lie_on_one_side_of_one_half():
    dark = np.where(HALF > 0, 90, 10).astype(np.uint8)
    assert scored(dark, threshold="otsu")["tp"] == 6
    assert scored(dark, threshold="0.5")["tp"] == 0


def test_a_map_of_another_size_is_resized_to_the_mask_before_the_threshold():
    small = np.array([[0, 255]], np.uint8)
    mask = np.repeat(np.array([[0, 0, 0, 255]], np.uint8), 2, axis=0)
    row = scored(small, mask)
    # Bilinear: 0, 64, 191, 255; the third column is called blurred.
    assert (row["tn"], row["fp"], row["fn"], row["tp"]) == (4, 2, 0, 2)
    assert row["mae"] == pytest.approx((0.25 + 0.75) / 4)


def test_a_fault_becomes_a_row_with_an_error_and_no_score():
    row = scored(np.zeros((3, 4, 3), np.uint8))
    assert row["mae"] is None
    assert "a.png: has mode RGB" in row["error"]


# Many items


def rows(*counts):
    names = ("name", "kind", "tn", "fp", "fn", "tp", "mae")
    return [dict(zip(names, values, strict=True)) | {"error": None} for values in counts]


def test_patches_of_a_photo_are_added_up_before_photos_are_compared():
    photos = evaluation.photo_table(
        rows(
            ("b", "motion", 5, 1, 1, 3, 0.2),
            ("a", "defocus", 9, 0, 0, 1, 0.1),
            ("b", "motion", 2, 2, 2, 4, 0.4),
        )
    ).to_pylist()
    assert [photo["name"] for photo in photos] == ["a", "b"]
    b = photos[1]
    assert (b["tn"], b["fp"], b["fn"], b["tp"], b["items"]) == (7, 3, 3, 7, 2)
    assert b["mae"] == pytest.approx(0.3)
    assert b["iou_blurred"] == pytest.approx(7 / 13)


def test_summary_pools_pixels_and_keeps_kinds_apart():
    photos = evaluation.photo_table(
        rows(
            ("a", "defocus", 90, 10, 0, 0, 0.1),
            ("b", "motion", 2, 2, 2, 4, 0.4),
            ("c", "motion", 5, 0, 0, 5, 0),
        )
    )
    assert photos["f_beta"].to_pylist()[0] == 0.0
    result = evaluation.summarize(photos)
    json.dumps(result, allow_nan=False)
    assert result["photos"] == 3
    assert result["pixel_accuracy"] == pytest.approx(106 / 120)
    assert result["mae"] == pytest.approx(0.5 / 3)
    assert result["by_kind"]["motion"]["iou_blurred"] == pytest.approx(9 / 13)
    assert result["by_kind"]["defocus"]["photos"] == 1
    assert result["per_photo"]["pixel_accuracy"] == pytest.approx((0.9 + 0.6 + 1) / 3)
    for scored in (result, result["per_photo"]):
        low, high = scored["mean_iou_interval"]
        assert low < scored["mean_iou"] < high
    # One photo drawn three times is the least and the most that a mean over three can be.
    each = photos["mean_iou"].to_pylist()
    assert result["per_photo"]["mean_iou_interval"] == pytest.approx([min(each), max(each)])


def test_a_score_that_no_photo_has_is_null():
    photos = evaluation.photo_table(rows(("a", "defocus", 100, 0, 0, 0, 0.1)))
    assert photos["iou_blurred"].to_pylist() == [None]
    assert evaluation.summarize(photos)["per_photo"]["iou_blurred"] is None


# What is scored


def test_a_photo_without_a_map_is_refused(folder):
    (folder / "maps/a.png").unlink()
    call = lambda: evaluation.find_inputs(str(folder / "data"), "test", str(folder / "maps"))  # noqa: E731
    refused(call, str(folder / "maps"), "'a' has no map", "a.png")


def test_a_wrong_mask_stops_before_anything_is_scored(folder):
    (folder / "data/masks/a.png").write_bytes(encoded(HALF // 2))
    call = lambda: evaluation.find_inputs(str(folder / "data"), "test", None)  # noqa: E731
    refused(call, "masks/a.png", "grey")


def test_patches_are_counted_by_split(tmp_path):
    source = write_patches(
        tmp_path / "p", [("a", "motion", "test"), ("a", "motion", "test"), ("b", "motion", "train")]
    )
    inputs = evaluation.find_inputs(source, "test", None)
    assert (inputs.items, inputs.patches) == (2, True)
    refused(lambda: evaluation.find_inputs(source, "val", None), "'val'", "test, train")
    refused(lambda: evaluation.find_inputs(source, "test", "maps"), "--maps", "index.csv")


def test_patches_of_one_split_are_read_with_their_bytes(tmp_path):
    source = write_patches(
        tmp_path / "p", [("a", "motion", "test"), ("b", "motion", "train"), ("c", "defocus", "test")]
    )
    tasks = evaluation.find_inputs(source, "test", None).tasks
    (table,) = scoring.read_patches(pa.Table.from_pylist(tasks))
    assert table["name"].to_pylist() == ["a", "c"]
    assert dataset.parse_mask(table["mask"][1].as_py(), "mask").tolist() == HALF.tolist()


def test_a_parquet_file_that_is_no_shard_is_refused(tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    (tmp_path / "dataset.json").write_text('{"shards": {"x.parquet": ""}}')
    refused(
        lambda: evaluation.find_inputs(str(tmp_path), "test", None),
        "x.parquet",
        "'photo' is missing",
        "jobs.prepare",
    )


def test_a_shard_that_storage_denies_is_not_called_damaged(tmp_path, monkeypatch):
    source = write_patches(tmp_path / "patches", [("a", "motion", "test")])

    def deny(self, path, mode="rb", **options):
        raise PermissionError(errno.EACCES, "Access Denied", path)

    monkeypatch.setattr(LocalFileSystem, "_open", deny)
    with pytest.raises(PermissionError, match="Access Denied"):
        evaluation.find_inputs(source, "test", None)


def test_out_inside_the_data_is_refused(folder):
    data = str(folder / "data")
    call = lambda: evaluation.evaluate(evaluation.Evaluation(data, f"{data}/out", maps="maps"))  # noqa: E731
    refused(call, "--out", "outside the data")


def test_a_model_that_is_not_there_is_refused_before_ray_starts(folder):
    run = evaluation.Evaluation(str(folder / "data"), str(folder / "out"), model=str(folder / "none"))
    refused(lambda: evaluation.evaluate(run), "no model at")
    assert not (folder / "out").exists()


def test_the_detector_scores_the_models_probability_at_mask_size(tmp_path):
    model = write_model(tmp_path / "model")
    photo = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    mask = np.zeros((96, 128), np.uint8)  # twice the photo: probabilities are resized to it
    row = {"name": "a", "kind": "motion", "image": encoded(photo), "mask": encoded(mask), "where": "a.png"}
    detector = scoring.Detector(model, read_card(model).digest, 1, "0.5", "none")
    (scored,) = detector(pa.Table.from_pylist([row], scoring.ITEM)).to_pylist()
    assert scored["error"] is None
    assert scored["tn"] + scored["fp"] == mask.size
    assert scored["mae"] == pytest.approx(float(bdnet.load(model).probability(photo).mean()), abs=0.01)
    (broken,) = detector(pa.Table.from_pylist([row | {"image": b"text"}], scoring.ITEM)).to_pylist()
    assert "a.png" in broken["error"]


def test_a_model_reads_the_photos_of_a_dataset_and_no_maps(folder):
    inputs = evaluation.find_inputs(str(folder / "data"), "test", None)
    items = scoring.read_photos(pa.Table.from_pylist(inputs.tasks))
    assert items["soft_map"].null_count == inputs.items == 2
    model = write_model(folder / "model")
    detector = scoring.Detector(model, read_card(model).digest, 1, "otsu", "none")
    rows = detector(items).to_pylist()
    assert [(row["name"], row["kind"], row["error"]) for row in rows] == [
        ("b", "motion", None),
        ("a", "defocus", None),
    ]


# Against published maps. The figures were computed by other code; 0.5 first, then Otsu.

PUBLISHED = {
    ("EFPN", "0.5"): (0.889, 0.860, 0.775, 0.851, 0.905, 0.120),
    ("EFPN", "otsu"): (0.890, 0.861, 0.776, 0.851, 0.906, 0.120),
    ("EHS", "0.5"): (0.891, 0.881, 0.786, 0.848, 0.921, 0.153),
    ("EHS", "otsu"): (0.887, 0.877, 0.778, 0.842, 0.918, 0.153),
    ("JNB", "0.5"): (0.784, 0.715, 0.590, 0.741, 0.816, 0.275),
    ("JNB", "otsu"): (0.792, 0.759, 0.624, 0.733, 0.840, 0.275),
}
COLUMNS = ("pixel_accuracy", "mean_accuracy", "mean_iou", "iou_blurred", "f_beta", "mae")


@needs_data
@pytest.mark.data
@pytest.mark.parametrize(("maps", "threshold"), PUBLISHED)
def test_published_maps_score_what_other_code_found(maps, threshold):
    photos = dataset.read_dataset(f"{DATA}/blurraw", "test")
    uris = evaluation._find_maps(f"{DATA}/peer_maps/{maps}", photos)
    tasks = [
        {"name": p.name, "kind": p.kind, "image_uri": None, "map_uri": uris[p.name], "mask_uri": p.mask_uri}
        for p in photos
    ]
    items = scoring.read_photos(pa.Table.from_pylist(tasks))
    table = scoring.score_items(items, scoring.given_map, threshold)
    result = evaluation.summarize(evaluation.photo_table(table.to_pylist()))
    assert tuple(round(result[name], 3) for name in COLUMNS) == PUBLISHED[maps, threshold]
    assert (result["by_kind"]["motion"]["photos"], result["by_kind"]["defocus"]["photos"]) == (48, 52)
    assert set(result["per_photo"]) == {*metrics.SCORES, "mean_iou_interval"}
