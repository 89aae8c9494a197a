"""What each cut takes of a photo, and what a patch dataset holds."""

import csv
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bdnet.photo import decode
from pipeline.dataset import LabelledPhoto, parse_mask, read_pair
from pipeline.patches import PATCH, cut_photo, decode_patch, read_shard, shard_uris, windows
from pipeline.schema import PATCHES


def starts(side):
    """Where the grid's windows begin along one side."""
    *grid, _whole_photo = windows("blurdb2", "motion", side, 256, rng())
    return [window.left for window in grid]


def rng():
    return np.random.default_rng(0)


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def labelled(folder, name="p", kind="motion", width=300, height=280, suffix=".png"):
    """A photo of noise and a mask that no compression would survive."""
    image, mask = folder / f"{name}{suffix}", folder / f"{name}.mask.png"
    Image.fromarray(noise(width, height)).save(image)
    Image.fromarray((noise(width, height, 1)[..., 0] > 99) * np.uint8(255)).save(mask)
    return LabelledPhoto(name, kind, "train", str(image), str(mask))


@pytest.mark.data
@pytest.mark.parametrize(
    ("cut", "split", "count"),
    [
        ("blurdb1", "train", 5_400),
        ("blurdb2", "train", 7_318),
        ("blurdb2", "test", 903),
        ("photos", "train", 800),
    ],
)
def test_the_cuts_give_the_published_counts_on_blurraw(data_dir, cut, split, count):
    with open(data_dir / "blurraw/index.csv", newline="") as file:
        photos = [row for row in csv.DictReader(file) if row["split"] == split]
    sizes = [(row["kind"], int(row["width"]), int(row["height"])) for row in photos]
    assert sum(len(windows(cut, *size, rng())) for size in sizes) == count


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (256, [0]),
        (298, [0]),  # 42 pixels are left over: less than a third of the stride
        (299, [0, 43]),  # 43 are more: one more window, at the edge
        (383, [0, 127]),
        (384, [0]),  # a window that would end exactly at the edge is not taken
        (385, [0, 128]),
        (640, [0, 128, 256]),
        (427, [0, 128, 171]),
    ],
)
def test_the_grid_is_the_papers(side, expected):
    assert starts(side) == expected


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["blurdb1", "blurdb2", "photos"]),
    st.sampled_from(["motion", "defocus"]),
    st.integers(PATCH, 2_000),
    st.integers(PATCH, 2_000),
)
def test_every_window_lies_in_the_photo(cut, kind, width, height):
    found = windows(cut, kind, width, height, rng())
    assert found
    for window in found:
        assert 0 <= window.left <= window.left + window.width <= width
        assert 0 <= window.top <= window.top + window.height <= height


def test_random_crops_are_more_of_the_rarer_kind():
    assert len(windows("blurdb1", "motion", 640, 480, rng())) == 12
    assert len(windows("blurdb1", "defocus", 640, 480, rng())) == 5


def test_random_crops_reach_every_edge():
    lefts = {windows("blurdb1", "motion", 258, 256, np.random.default_rng(n))[0].left for n in range(60)}
    assert lefts == {0, 1, 2}


@pytest.mark.parametrize("cut", ["blurdb1", "blurdb2", "photos"])
def test_the_same_seed_gives_the_same_bytes(tmp_path, cut):
    photo = labelled(tmp_path)
    assert list(cut_photo(photo, cut, seed=3)) == list(cut_photo(photo, cut, seed=3))


def test_another_seed_and_another_photo_give_other_crops(tmp_path):
    photo, other = labelled(tmp_path, "p"), labelled(tmp_path, "q")

    def crops(photo, seed):
        return [(row["left"], row["top"]) for row in cut_photo(photo, "blurdb1", seed)]

    assert crops(photo, 3) != crops(photo, 4)
    assert crops(photo, 3) != crops(other, 3)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("cut", ["blurdb1", "blurdb2", "photos"])
def test_a_patch_is_its_window_without_loss(tmp_path, cut, suffix):
    photo = labelled(tmp_path, suffix=suffix)
    pixels, mask = read_pair(photo)
    for row in pa.Table.from_pylist(list(cut_photo(photo, cut, 0)), schema=PATCHES).to_pylist():
        left, top, width, height = (row[n] for n in ("left", "top", "width", "height"))
        box = np.s_[top : top + height, left : left + width]
        patch, patch_mask = decode_patch(row)
        if patch.shape[:2] == (height, width):
            np.testing.assert_array_equal(patch, pixels[box])
            np.testing.assert_array_equal(patch_mask, mask[box])
        else:  # the whole photo among BlurDB2's windows
            assert (cut, patch.shape, patch_mask.shape) == ("blurdb2", (PATCH, PATCH, 3), (PATCH, PATCH))
            assert (width, height) == (300, 280)
            assert set(np.unique(patch_mask)) == {0, 255}
        assert row["blurred_fraction"] == (patch_mask > 0).mean()


def test_a_row_names_photo_kind_split_and_cut(tmp_path):
    row = next(cut_photo(labelled(tmp_path, "the photo", "defocus"), "blurdb1", 0))
    assert [row[name] for name in ("photo", "kind", "split", "cut")] == [
        "the photo",
        "defocus",
        "train",
        "blurdb1",
    ]


def test_whole_photos_keep_their_own_bytes(tmp_path):
    photo = labelled(tmp_path, suffix=".jpg", width=60, height=40)
    [row] = cut_photo(photo, "photos", 0)
    assert row["image"] == (tmp_path / "p.jpg").read_bytes()
    assert parse_mask(row["mask"], "mask").shape == (40, 60)
    assert decode(row["image"], None).pixels.shape == (40, 60, 3)


@pytest.mark.parametrize(("cut", "patches"), [("photos", 1), ("blurdb1", 12)])
def test_a_photo_of_many_pixels_trains_at_working_size_as_audits_see_it(tmp_path, cut, patches):
    photo = labelled(tmp_path, suffix=".jpg", width=2000, height=1000)
    Image.fromarray(np.repeat([0, 255], 1000).astype(np.uint8)[None].repeat(1000, 0)).save(photo.mask_uri)
    rows = list(cut_photo(photo, cut, 0))
    assert len(rows) == patches
    for row in rows:
        assert row["left"] + row["width"] <= 640
        assert row["top"] + row["height"] <= 320
        image, mask = decode_patch(row)
        assert image.shape[:2] == mask.shape == (row["height"], row["width"])
        if cut == "photos":
            audited = decode(Path(photo.image_uri).read_bytes(), 640)
            np.testing.assert_array_equal(image, audited.pixels)
        blurred_from = np.clip(320 - row["left"], 0, row["width"])
        assert (mask == np.where(np.arange(row["width"]) < blurred_from, 0, 255)).all()


@pytest.mark.parametrize("cut", ["blurdb1", "blurdb2"])
@pytest.mark.parametrize("size", [(255, 400), (400, 255)])
def test_a_photo_smaller_than_a_patch_is_refused_by_name(tmp_path, cut, size):
    photo = labelled(tmp_path, width=size[0], height=size[1])
    with pytest.raises(ValueError, match=re.escape(f"{photo.image_uri}: it is {size[0]}×{size[1]}")):
        list(cut_photo(photo, cut, 0))


def test_a_patch_that_is_broken_names_its_photo(tmp_path):
    [row] = cut_photo(labelled(tmp_path), "photos", 0)
    with pytest.raises(ValueError, match="patch of p: unreadable"):
        decode_patch({**row, "image": b"no image"})
    with pytest.raises(ValueError, match="mask of p"):
        decode_patch({**row, "mask": b"no image"})


def test_a_folder_without_a_manifest_is_no_patch_dataset(tmp_path):
    (tmp_path / "shard-00000.parquet").write_bytes(b"of a run that was killed")
    with pytest.raises(ValueError, match="no complete patch dataset"):
        shard_uris(str(tmp_path))


@pytest.mark.parametrize("content", ["{}", "[]", '{"shards": 1}', "no JSON"])
def test_a_dataset_json_of_another_program_is_named(tmp_path, content):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=r"is not one that jobs\.prepare wrote"):
        shard_uris(str(tmp_path))


def test_shards_are_those_that_the_manifest_names(tmp_path):
    (tmp_path / "dataset.json").write_text('{"shards": ["shard-00000.parquet"]}')
    (tmp_path / "shard-00001.parquet").write_bytes(b"left over from a larger run")
    assert shard_uris(str(tmp_path)) == [f"{tmp_path}/shard-00000.parquet"]


def test_columns_are_read_alone(tmp_path):
    table = pa.Table.from_pylist(list(cut_photo(labelled(tmp_path), "photos", 0)), schema=PATCHES)
    pq.write_table(table, tmp_path / "shard.parquet")
    assert read_shard(str(tmp_path / "shard.parquet")) == table
    assert read_shard(str(tmp_path / "shard.parquet"), ["photo", "kind"]).column_names == ["photo", "kind"]
