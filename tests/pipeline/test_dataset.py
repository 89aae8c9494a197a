import io
import os
import re

import fsspec
import numpy as np
import pytest
from PIL import Image

from pipeline import dataset

DATA = os.environ.get("BDNET_DATA")
needs_data = pytest.mark.skipif(
    not DATA, reason="needs BlurRaw: set BDNET_DATA to the folder that holds blurraw/ and peer_maps/"
)

HALF = np.array([[0, 0, 255, 255]] * 3, np.uint8)


def encoded(pixels, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write_dataset(folder, index="name,kind,split\nb,motion,test\na,defocus,train\n"):
    """Two 4×3 photos, one of each kind and split, in an order that isn't the alphabet's."""
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    (folder / "index.csv").write_text(index)
    for name, suffix in (("a", ".png"), ("b", ".JPG")):
        photo = encoded(np.full((3, 4, 3), 90, np.uint8), "PNG" if suffix == ".png" else "JPEG")
        (folder / "images" / f"{name}{suffix}").write_bytes(photo)
        (folder / "masks" / f"{name}.png").write_bytes(encoded(HALF))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path)


def refused(call, first, *parts):
    """The refusal is one line that holds every part."""
    with pytest.raises(ValueError, match=re.escape(first)) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_photos_come_in_the_order_of_the_index(folder):
    photos = dataset.read_dataset(str(folder))
    assert [photo.name for photo in photos] == ["b", "a"]
    assert photos[0] == dataset.LabelledPhoto(
        "b", "motion", "test", str(folder / "images/b.JPG"), str(folder / "masks/b.png")
    )


def test_only_the_asked_split_is_returned(folder):
    assert [photo.name for photo in dataset.read_dataset(str(folder), "train")] == ["a"]


def test_an_index_saved_by_a_spreadsheet_with_a_byte_order_mark_is_read(folder):
    (folder / "index.csv").write_bytes(b"\xef\xbb\xbfname,kind,split\r\na,motion,test\r\n")
    assert [photo.name for photo in dataset.read_dataset(str(folder))] == ["a"]


@pytest.mark.parametrize(
    ("index", "parts"),
    [
        ("", ["index.csv", "column 'name' is missing"]),
        ("name,kind\na,motion\n", ["index.csv", "column 'split' is missing", "first line must name"]),
        ("name,kind,split\n", ["index.csv", "lists no photo", "add a row"]),
        ("name,kind,split\na,motion,test\na,motion,test\n", ["line 3", "'a' is listed twice", "keep one"]),
        ("name,kind,split\na,shake,test\n", ["line 2", "'a'", "'shake'", "motion or defocus"]),
        ("name,kind,split\na,motion\n", ["line 2", "'split' is empty"]),
        ("name,kind,split\n,motion,test\n", ["line 2", "'name' is empty"]),
        ("name,kind,split\n../a,motion,test\n", ["line 2", "'../a'", "without suffix or folder"]),
        ("name,kind,split\nx/a,motion,test\n", ["line 2", "'x/a'"]),
        ('name,kind,split\n"x\\a",motion,test\n', ["line 2", "no photo name"]),
        ("name,kind,split\n..,motion,test\n", ["line 2", "'..'"]),
        ('name,kind,split\n"a\nb",motion,test\n', ["line 3", "no photo name"]),
        ('name,kind,split\n"' + "a,motion,test\n" * 10_000, ["index.csv line", "look for a lone quote"]),
    ],
)
def test_a_wrong_index_is_refused(folder, index, parts):
    (folder / "index.csv").write_text(index)
    refused(lambda: dataset.read_dataset(str(folder)), *parts)


def test_a_folder_without_index_is_refused(tmp_path):
    refused(lambda: dataset.read_dataset(str(tmp_path)), f"{tmp_path}/index.csv: not found", "images/")


def test_an_index_in_another_encoding_is_refused(folder):
    (folder / "index.csv").write_bytes("name,kind,split\nä,motion,test\n".encode("latin-1"))
    refused(lambda: dataset.read_dataset(str(folder)), "index.csv", "UTF-8")


def test_an_unknown_split_is_refused_with_the_splits_there_are(folder):
    refused(lambda: dataset.read_dataset(str(folder), "val"), "index.csv", "'val'", "test, train")


@pytest.mark.parametrize("lost", ["images/a.png", "masks/a.png"])
def test_a_missing_file_is_refused(folder, lost):
    (folder / lost).unlink()
    refused(lambda: dataset.read_dataset(str(folder)), "photo 'a'", lost, "is missing; add it")


def test_a_missing_file_of_another_split_is_no_concern(folder):
    (folder / "masks/a.png").unlink()
    assert len(dataset.read_dataset(str(folder), "test")) == 1


def test_a_file_in_a_folder_below_is_not_the_photo(folder):
    (folder / "images/below").mkdir()
    (folder / "images/a.png").rename(folder / "images/below/a.png")
    refused(lambda: dataset.read_dataset(str(folder)), "images/a.png is missing")


def test_a_link_goes_by_its_own_name_as_data_version_control_makes_them(folder):
    store = folder / "store"
    store.mkdir()
    for file in (folder / "images/b.JPG", folder / "masks/b.png"):
        file.rename(store / f"6f1e{file.suffix}")
        file.symlink_to(store / f"6f1e{file.suffix}")
    photo = dataset.read_dataset(str(folder))[0]
    assert (photo.name, photo.image_uri) == ("b", str(folder / "images/b.JPG"))
    dataset.read_pair(photo)


def test_two_images_of_one_name_are_refused(folder):
    (folder / "images/b.png").write_bytes((folder / "images/a.png").read_bytes())
    refused(lambda: dataset.read_dataset(str(folder)), "b.JPG and", "b.png both exist; keep one")


def photo_a(folder):
    return next(photo for photo in dataset.read_dataset(str(folder)) if photo.name == "a")


def test_a_pair_is_the_photo_and_its_mask_at_native_size(folder):
    pixels, mask = dataset.read_pair(photo_a(folder))
    assert (pixels.shape, pixels.dtype) == ((3, 4, 3), np.uint8)
    assert (mask.tolist(), mask.dtype) == (HALF.tolist(), np.uint8)


def test_a_photo_turned_by_exif_is_paired_with_its_upright_mask(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    lying = encoded(np.full((4, 3, 3), 90, np.uint8), "PNG", exif=exif)
    (folder / "images/a.png").write_bytes(lying)
    assert dataset.read_pair(photo_a(folder))[0].shape == (3, 4, 3)


@pytest.mark.parametrize(
    ("file", "data", "parts"),
    [
        ("masks/a.png", encoded(HALF[:2]), ["the mask is 4×2", "photo is 4×3", "save the mask at"]),
        ("masks/a.png", encoded(HALF // 2), ["the mask is grey (value 127", "255 where blurred"]),
        ("masks/a.png", encoded(np.zeros((3, 4, 3), np.uint8)), ["mode RGB", "grey PNG"]),
        ("masks/a.png", b"not a picture", ["unreadable", "save it as PNG"]),
        (
            "masks/a.png",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 3\n",
            ["not an image", "save it as PNG"],
        ),
        ("masks/a.png", encoded(np.tile(HALF, (99, 99)))[:-200], ["unreadable", "save it as PNG"]),
        ("images/a.png", b"not a picture", ["replace the photo"]),
        ("images/a.png", b"", ["replace the photo"]),
    ],
    ids=["size", "grey", "colour", "text", "a program", "cut off", "photo is text", "photo is empty"],
)
def test_a_wrong_pair_is_refused(folder, file, data, parts):
    (folder / file).write_bytes(data)
    photos = dataset.read_dataset(str(folder))
    message = refused(lambda: dataset.read_pair(photos[1]), str(folder / file), *parts)
    refused(lambda: dataset.check_pairs(photos), message)


def test_check_pairs_names_the_first_wrong_photo_of_the_index(folder):
    for name in ("a", "b"):
        (folder / f"masks/{name}.png").write_bytes(encoded(HALF // 2))
    refused(lambda: dataset.check_pairs(dataset.read_dataset(str(folder))), "masks/b.png")


def test_a_one_bit_mask_is_0_and_255():
    mask = dataset.parse_mask(encoded(HALF > 0), "mask")
    assert (mask.tolist(), mask.dtype) == (HALF.tolist(), np.uint8)


def test_a_dataset_may_lie_in_any_fsspec_storage(folder):
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/labelled", recursive=True)
    try:
        photos = dataset.read_dataset("memory://labelled")
        assert [photo.name for photo in photos] == ["b", "a"]
        dataset.check_pairs(photos)
    finally:
        memory.rm("/labelled", recursive=True)


@needs_data
@pytest.mark.data
def test_blurraw_is_a_dataset():
    assert len(dataset.read_dataset(f"{DATA}/blurraw", "train")) == 800
    photos = dataset.read_dataset(f"{DATA}/blurraw", "test")
    assert len(photos) == 100
    dataset.check_pairs(photos)
