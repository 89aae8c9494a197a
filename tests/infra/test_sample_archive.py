import hashlib
import json
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

pytest.importorskip("skimage", reason="the sample photographs ship in scikit-image: pip install '.[demo]'")
pytest.importorskip("sklearn", reason="the sample photographs ship in scikit-learn: pip install '.[demo]'")

from infra.sample_archive import blur_by_layers, disk, line, make_sample_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    dest = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_args, **_kwargs):
            raise AssertionError("the sample archive must not use the network")

        patch.setattr(socket, "socket", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        photos = make_sample_archive(dest)
    return dest, photos


@pytest.fixture(scope="module")
def truth(archive):
    return json.loads((archive[0] / "truth.json").read_text(encoding="utf-8"))


def _upright(path):
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image)


def _digests(folder: Path):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _named(truth, status):
    names = [name for name, facts in truth.items() if facts["expected_status"] == status]
    assert names, f"no {status} file in the archive"
    return names


def test_truth_names_every_photo_and_the_sidecar_is_the_only_other_file(archive, truth):
    dest, photos = archive
    assert photos == sorted(dest / "photos" / name for name in truth)
    others = {path for path in (dest / "photos").rglob("*") if path.is_file()} - set(photos)
    assert [path.suffix for path in others] == [".xml"]
    assert 30 <= len(photos) <= 45
    assert sum(path.stat().st_size for path in dest.rglob("*") if path.is_file()) < 30e6


def test_ok_photos_load_whole(archive, truth):
    for name in _named(truth, "ok"):
        with Image.open(archive[0] / "photos" / name) as image:
            image.load()


def test_truncated_photo_has_a_header_but_not_all_its_pixels(archive, truth):
    for name in _named(truth, "truncated"):
        with Image.open(archive[0] / "photos" / name) as image, pytest.raises(OSError, match="truncated"):
            image.load()


def test_unreadable_and_empty_files_are_no_images(archive, truth):
    for name in _named(truth, "unreadable") + _named(truth, "empty"):
        with pytest.raises(OSError, match="cannot identify"):
            Image.open(archive[0] / "photos" / name)
    assert [(archive[0] / "photos" / name).stat().st_size for name in _named(truth, "empty")] == [0]


def test_the_decompression_bomb_is_a_tiny_file_that_claims_50000_squared(archive, truth, monkeypatch):
    [name] = _named(truth, "too_large")
    path = archive[0] / "photos" / name
    assert path.stat().st_size < 1000
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with Image.open(path) as image:
        assert image.size == (50_000, 50_000)
        image.verify()  # every chunk's checksum is right


def test_masks_are_of_the_upright_photo_strictly_black_or_white_and_agree_with_truth(archive, truth):
    dest, _ = archive
    known = {name: facts for name, facts in truth.items() if facts["blurred_fraction"] is not None}
    assert {f"{name}.png" for name in known} == set(_digests(dest / "masks"))
    for name, facts in known.items():
        with Image.open(dest / "masks" / f"{name}.png") as image:
            mask = np.asarray(image)
        assert mask.shape == _upright(dest / "photos" / name).size[::-1], name
        assert set(np.unique(mask)) <= {0, 255}, name
        assert (mask == 255).mean() == pytest.approx(facts["blurred_fraction"], abs=1e-4), name
        assert (facts["kind"] is None) == (facts["blurred_fraction"] == 0), name


def test_both_kinds_come_regional_and_whole(truth):
    for kind in ("motion", "defocus"):
        fractions = [f["blurred_fraction"] for f in truth.values() if f["kind"] == kind]
        assert 1.0 in fractions
        assert any(fraction is not None and 0.1 < fraction < 0.9 for fraction in fractions)


def test_the_mask_divides_sharp_from_blurred(archive):
    # How much is left of the sharp photo's edges (neighbours that differ by more than 15).
    dest, _ = archive
    for name in ("astronaut-background-defocused", "astronaut-focus-on-background"):
        steps, sharp_steps = (
            np.abs(
                np.diff(np.asarray(_upright(dest / f"photos/2024/studio/{n}.jpg").convert("L"), np.float32))
            )
            for n in (name, "astronaut")
        )
        with Image.open(dest / "masks/2024/studio" / f"{name}.jpg.png") as image:
            mask = np.asarray(image)[:, 1:] == 255
        edges = sharp_steps > 15
        inside, outside = (
            steps[edges & part].mean() / sharp_steps[edges & part].mean() for part in (mask, ~mask)
        )
        assert inside < 0.4, name
        assert outside > 0.8, name


def test_formats_and_odd_names(archive):
    photos = archive[0] / "photos/2024"
    facts = {path.name: (image.format, image.mode) for path, image in _open_all(photos / "formats")}
    assert facts["espresso-cmyk.jpg"] == ("JPEG", "CMYK")
    assert facts["cameraman-grey.jpg"] == ("JPEG", "L")
    assert facts["pagoda.png"] == ("PNG", "RGB")
    assert '<b>bold & "quoted".jpg' in facts
    assert any(" " in path.name and not path.name.isascii() for path in archive[1])
    large = [image.size for _, image in _open_all(photos / "garage") if image.width * image.height >= 12e6]
    assert len(large) == 1


def test_the_rotated_photo_is_stored_lying_and_carries_its_camera(archive):
    with Image.open(archive[0] / "photos/2024/studio/portrait-exif-rotated.jpg") as image:
        exif = image.getexif()
        taken = exif.get_ifd(ExifTags.IFD.Exif)
        assert image.width > image.height
        upright = np.asarray(ImageOps.exif_transpose(image), np.float32)
    with Image.open(archive[0] / "photos/2024/studio/astronaut.jpg") as image:
        face = np.asarray(image.crop((170, 60, 270, 180)), np.float32)
    assert np.abs(upright[60:180, 150:250] - face).mean() < 6  # the same face, the right way up
    assert exif[ExifTags.Base.Orientation] == 6
    assert (exif[ExifTags.Base.Make], exif[ExifTags.Base.Model]) == ("Sample", "Sample Camera 1")
    assert taken[ExifTags.Base.DateTimeOriginal] == "2024:03:09 16:20:31"
    assert taken[ExifTags.Base.SubsecTimeOriginal] == "50"
    assert taken[ExifTags.Base.ISOSpeedRatings] == 400
    assert float(taken[ExifTags.Base.ExposureTime]) == pytest.approx(1 / 200)
    assert float(taken[ExifTags.Base.FNumber]) == pytest.approx(2.8)
    assert float(taken[ExifTags.Base.FocalLength]) == 50


def test_a_second_run_writes_the_same_bytes(archive, tmp_path):
    make_sample_archive(tmp_path)
    assert _digests(tmp_path) == _digests(archive[0])


def test_without_the_packages_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ValueError, match=r"pip install '.\[demo\]'"):
        make_sample_archive(tmp_path)


def test_kernels_keep_the_light_and_have_their_size():
    for kernel in (disk(7.5), line(31, 40)):
        assert kernel.sum() == pytest.approx(1, abs=1e-5)
        assert kernel.shape[0] == kernel.shape[1]
    rows, columns = np.nonzero(line(30, 0))
    assert np.ptp(columns) == pytest.approx(31, abs=2)
    assert np.ptp(rows) <= 2
    rows, columns = np.nonzero(line(30, 45))
    assert np.corrcoef(rows, columns)[0, 1] < -0.9  # counterclockwise: to the right is up


def test_blur_adds_light_so_a_highlight_stays_bright():
    photo = np.zeros((64, 64, 3), np.uint8)
    photo[28:36, 28:36] = 255
    pixels, mask = blur_by_layers(photo, np.zeros((64, 64), np.intp), [disk(8)])
    assert mask.all()
    # 64 lit pixels under a disk of about 201: a third of the light is 59% of the pixel value.
    assert pixels[32, 32].mean() == pytest.approx(255 * (64 / (np.pi * 8**2)) ** (1 / 2.2), abs=12)


def test_nothing_of_a_sharp_subject_leaks_into_the_blur_behind_it():
    photo = np.full((60, 60, 3), 40, np.uint8)
    photo[:, 30:] = 250
    subject = np.zeros((60, 60), np.intp)
    subject[:, 30:] = 1
    pixels, mask = blur_by_layers(photo, subject, [disk(9), None])
    assert pixels[:, :25].mean() == pytest.approx(40, abs=1)
    assert mask[:, :29].all()
    assert not mask[:, 31:].any()


def _open_all(folder: Path):
    for path in sorted(folder.glob("*.[jp][pn]g")):
        with Image.open(path) as image:
            yield path, image
