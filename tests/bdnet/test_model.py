"""A model goes to a folder and comes back the same; whatever isn't whole is refused with a remedy."""

import hashlib
import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import bdnet
from bdnet import card
from bdnet import model as models
from bdnet.card import (
    CARD_FILE,
    DEFAULT_MODEL,
    PREPROCESSING_VERSION,
    WEIGHTS_FILE,
    WORKING_SIZE,
    Card,
    read_card,
)
from bdnet.model import Model, load, save
from bdnet.networks import build
from bdnet.output import Output

ARCH = "bdnet-resnet18"


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    """The same arithmetic on every machine; one test asks for the other."""
    monkeypatch.setattr(models, "has_fast_bfloat16", lambda device: False)


def noise(batch=1, height=64, width=96, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def net():
    """Untrained, but with statistics of real activations: without them every probability is 0 or 1."""
    torch.manual_seed(0)
    net = build(ARCH)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5  # one batch is enough, and no variance comes near 0
    with torch.no_grad():
        net(models.normalize(torch.from_numpy(noise(4))))
    return net.eval()


@pytest.fixture(scope="module")
def saved(net, tmp_path_factory) -> Path:
    """A saved model; tests only read it."""
    folder = tmp_path_factory.mktemp("model")
    save(net, str(folder), {"arch": ARCH, "scores": {"mean_iou": 0.5}})
    return folder


def changed(saved: Path, folder: Path, **fields) -> str:
    """A copy of the saved model with other fields in its card."""
    card = json.loads((saved / CARD_FILE).read_text()) | fields
    (folder / WEIGHTS_FILE).write_bytes((saved / WEIGHTS_FILE).read_bytes())
    (folder / CARD_FILE).write_text(json.dumps(card))
    return str(folder)


class BrightIsBlurred(nn.Module):
    """Calls a pixel blurred where it is bright, and the blur motion: its mask shows which way is up."""

    def forward(self, images):
        said = images.sum(dim=1)
        return Output(torch.stack([-said, said], dim=1), torch.tensor([[3.0, 0.0]]).repeat(len(images), 1))


def bright_is_blurred(working_size=WORKING_SIZE):
    return Model(BrightIsBlurred(), Card(ARCH, "", working_size=working_size), "cpu")


def jpeg(width=96, height=64, orientation=1, subject_area=None) -> bytes:
    """A photo whose left half is white as stored."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    if subject_area:
        exif.get_ifd(0x8769)[0x9214] = subject_area
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


# --- on disk


def test_a_saved_model_says_the_same_when_loaded(net, saved):
    images = noise(2, seed=100)
    before, kinds_before = Model(net, Card(ARCH, ""), "cpu").predict(images)
    after, kinds_after = load(str(saved), "cpu").predict(images)
    assert before.std() > 0.01  # the network does tell pixels apart
    assert np.abs(after - before).max() < 0.01  # weights lost half of their digits
    assert np.abs(kinds_after - kinds_before).max() < 0.01


def test_loading_is_exact_and_repeatable(saved):
    images = noise(seed=100)
    assert np.array_equal(
        load(str(saved), "cpu").predict(images)[0], load(str(saved), "cpu").predict(images)[0]
    )


def test_weights_are_half_precision_safetensors_with_full_statistics(net, saved):
    assert sorted(path.name for path in saved.iterdir()) == [CARD_FILE, WEIGHTS_FILE]
    with safetensors.safe_open(saved / WEIGHTS_FILE, "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert set(dtypes) == {name for name in net.state_dict() if not name.endswith("num_batches_tracked")}
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if "running_" in name else torch.float16), name
    assert (saved / WEIGHTS_FILE).stat().st_size < 25e6


def test_the_card_says_what_was_given_and_the_weights_digest(saved):
    card = read_card(str(saved))
    assert card == Card(
        arch=ARCH,
        digest=hashlib.sha256((saved / WEIGHTS_FILE).read_bytes()).hexdigest(),
        working_size=640,
        preprocessing=PREPROCESSING_VERSION,
        scores={"mean_iou": 0.5},
    )
    assert load(str(saved), "cpu").card == card


def test_any_fsspec_uri_will_do(net, saved):
    try:
        written = save(net, "memory://models/mine", {"arch": ARCH, "scores": {"mean_iou": 0.5}})
        assert written == read_card("memory://models/mine") == read_card(str(saved))
        assert load("memory://models/mine", "cpu").card == written
    finally:
        fsspec.filesystem("memory").rm("/models", recursive=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_weights_that_half_precision_cannot_hold_are_not_saved(bad, tmp_path):
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.bias, bad)
    with pytest.raises(ValueError, match="bias is not finite in half precision; the training diverged"):
        save(layer, str(tmp_path / "model"), {"arch": ARCH})
    assert not (tmp_path / "model").exists()


def test_statistics_too_large_for_half_precision_are_kept(tmp_path):
    normalisation = nn.BatchNorm2d(1)
    normalisation.running_var.fill_(1e-9)
    normalisation.running_mean.fill_(1e6)
    save(normalisation, str(tmp_path), {"arch": ARCH})
    state = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    assert state["running_var"].item() == pytest.approx(1e-9)
    assert state["running_mean"].item() == 1e6


def test_weights_that_are_not_the_cards_are_refused(saved, tmp_path):
    folder = changed(saved, tmp_path)
    with (tmp_path / WEIGHTS_FILE).open("r+b") as file:
        file.seek(-1, io.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(ValueError, match="is not the one its card describes; copy both again"):
        load(folder)


def test_another_preprocessing_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"expects preprocessing 0, this bdnet has .* train it again"):
        load(changed(saved, tmp_path, preprocessing="0"))


def test_an_architecture_of_a_newer_bdnet_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="unknown architecture 'bdnet-vit'; choose one of"):
        load(changed(saved, tmp_path, arch="bdnet-vit"))


def test_weights_of_another_architecture_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="doesn't hold the weights of bdnet-resnet34"):
        load(changed(saved, tmp_path, arch="bdnet-resnet34"))


@pytest.mark.parametrize(
    "card", ["{}", "[]", "no json", '{"arch": "a", "digest": "b", "new": 1}', "[" * 100_000], ids=range(5)
)
def test_a_card_that_is_none_is_refused(card, saved, tmp_path):
    folder = changed(saved, tmp_path)
    (tmp_path / CARD_FILE).write_text(card)
    with pytest.raises(ValueError, match=r"card\.json is no card that this bdnet reads .*copy it again"):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"arch": ["bdnet-resnet18"]},
        {"working_size": "640"},
        {"working_size": 0},
        {"temperature": None},
        {"temperature": 0},
        {"temperature": float("nan")},
        {"ranges": []},
        {"ranges": {"conv1": "wide"}},
    ],
    ids=str,
)
def test_a_card_with_a_value_that_makes_no_sense_is_refused(change, saved, tmp_path):
    with pytest.raises(ValueError, match=r"card\.json is no card that this bdnet reads"):
        load(changed(saved, tmp_path, **change))


def test_a_card_that_is_no_text_is_refused(saved, tmp_path):
    folder = changed(saved, tmp_path)
    (tmp_path / CARD_FILE).write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"card\.json is no card that this bdnet reads"):
        load(folder)


def test_a_pickle_in_the_weights_place_is_refused_and_never_run(saved, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    payload = pickle.dumps(Payload())
    folder = changed(saved, tmp_path, digest=hashlib.sha256(payload).hexdigest())
    (tmp_path / WEIGHTS_FILE).write_bytes(payload)
    with pytest.raises(ValueError, match="doesn't hold the weights"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_of_a_type_that_torch_has_not_are_refused(saved, tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + b"\0"
    folder = changed(saved, tmp_path, digest=hashlib.sha256(weights).hexdigest())
    (tmp_path / WEIGHTS_FILE).write_bytes(weights)
    with pytest.raises(ValueError, match="doesn't hold the weights"):
        load(folder)


@pytest.mark.parametrize("missing", [WEIGHTS_FILE, CARD_FILE])
def test_half_a_model_is_no_model(missing, saved, tmp_path):
    folder = changed(saved, tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=rf"no model at .*expected {WEIGHTS_FILE} and {CARD_FILE}"):
        load(folder)


def test_where_there_is_no_model_the_error_says_what_to_give(saved):
    for nowhere in ("bdnet-resnet19", "memory://nowhere", str(saved / WEIGHTS_FILE)):
        with pytest.raises(ValueError, match=r"no model at .*or the name of a shipped model"):
            load(nowhere)


# --- the models that come with bdnet


def test_a_shipped_model_is_found_by_name_and_detects_in_three_lines(saved, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(saved, target_is_directory=True)
    monkeypatch.setattr(card, "resources", SimpleNamespace(files=lambda package: tmp_path))
    (tmp_path / "photo.jpg").write_bytes(jpeg())
    assert card.shipped_models() == ["tiny"]

    detection = bdnet.load("tiny").detect(tmp_path / "photo.jpg")
    assert detection.mask.shape == (64, 96)
    assert detection.verdict in ("sharp", "partly_blurred", "blurred")
    with pytest.raises(ValueError, match=r"shipped model \(tiny\)"):
        load("other")


def test_the_default_model_is_shipped_whole_and_small():
    model = load(DEFAULT_MODEL, "cpu")
    assert model.card.arch == DEFAULT_MODEL
    assert len(card.read_folder(DEFAULT_MODEL)[0]) <= 25 * 2**20
    assert model.detect(jpeg()).mask.shape == (64, 96)


# --- detection


def test_a_batch_is_predicted_as_its_photos_one_by_one(net):
    model = Model(net, Card(ARCH, ""), "cpu")
    images = noise(3, 33, 65, seed=7)
    probability, kinds = model.predict(images)
    assert probability.shape == (3, 33, 65)
    assert kinds.shape == (3, 2)
    assert probability.dtype == kinds.dtype == np.float32
    assert np.allclose(kinds.sum(axis=1), 1)
    for index in range(3):
        alone, kind_alone = model.predict(images[index : index + 1])
        assert np.allclose(probability[index], alone[0], atol=1e-4)
        assert np.allclose(kinds[index], kind_alone[0], atol=1e-4)
        assert np.array_equal(model.probability(images[index]), alone[0])


def test_probabilities_are_the_softmax_of_the_networks_scores(net):
    images = noise(seed=3)
    probability, kinds = Model(net, Card(ARCH, ""), "cpu").predict(images)
    with torch.inference_mode():
        output = net(models.normalize(torch.from_numpy(images)))
    assert np.allclose(probability, torch.softmax(output.logits, 1)[:, 1].numpy(), atol=1e-5)
    assert np.allclose(kinds, torch.softmax(output.kind_logits, 1).numpy(), atol=1e-5)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="torch has no bf16 here, not even emulated"
)
def test_bfloat16_gives_nearly_the_same_in_float32(net, monkeypatch):
    images = noise(seed=3)
    exact, _ = Model(net, Card(ARCH, ""), "cpu").predict(images)
    monkeypatch.setattr(models, "has_fast_bfloat16", lambda device: True)
    quick, kinds = Model(net, Card(ARCH, ""), "cpu").predict(images)
    assert quick.dtype == kinds.dtype == np.float32
    assert not np.array_equal(quick, exact)
    assert np.abs(quick - exact).max() < 0.1


def test_a_model_takes_a_network_out_of_training():
    model, images = Model(build(ARCH).train(), Card(ARCH, ""), "cpu"), noise()
    assert not any(module.training for module in model.net.modules())
    assert np.array_equal(model.predict(images)[0], model.predict(images)[0])


@pytest.mark.parametrize(
    ("orientation", "blurred_part"),
    [
        (1, np.s_[:, :40]),
        (3, np.s_[:, 56:]),
        (6, np.s_[:40, :]),  # turned clockwise: what was left is on top
        (8, np.s_[56:, :]),
    ],
)
def test_the_mask_is_upright(orientation, blurred_part):
    detection = bright_is_blurred().detect(jpeg(orientation=orientation))
    assert detection.mask.shape == ((64, 96) if orientation in (1, 3) else (96, 64))
    assert detection.mask[blurred_part].all()
    assert detection.blurred_fraction == pytest.approx(0.5, abs=0.02)
    assert (detection.verdict, detection.blur_kind) == ("partly_blurred", "motion")
    assert detection.subject_source == "centre"


def test_the_subject_area_turns_with_the_photo():
    # The camera writes it for the stored picture: x and y of the middle, width and height.
    for orientation in (1, 6):
        on_the_blur = bright_is_blurred().detect(jpeg(orientation=orientation, subject_area=(20, 32, 16, 16)))
        beside_it = bright_is_blurred().detect(jpeg(orientation=orientation, subject_area=(76, 32, 16, 16)))
        assert (on_the_blur.subject_source, on_the_blur.focus) == ("exif", "suspected_miss")
        assert (beside_it.subject_blurred_fraction, beside_it.focus) == (0.0, "shallow_depth")


def test_a_path_a_string_and_bytes_are_the_same_photo(tmp_path):
    path, model = tmp_path / "photo.jpg", bright_is_blurred()
    path.write_bytes(jpeg())
    masks = [model.detect(photo).mask for photo in (path, str(path), path.read_bytes())]
    assert np.array_equal(masks[0], masks[1])
    assert np.array_equal(masks[0], masks[2])


def test_it_looks_at_the_cards_working_size_unless_told_and_never_enlarges():
    photo = jpeg(300, 200)
    assert bright_is_blurred(working_size=150).detect(photo).mask.shape == (100, 150)
    assert bright_is_blurred(working_size=150).detect(photo, working_size=60).mask.shape == (40, 60)
    assert bright_is_blurred(working_size=640).detect(photo).mask.shape == (200, 300)


def test_a_working_size_of_nothing_is_refused():
    with pytest.raises(ValueError, match="working size is 0: give at least 1"):
        bright_is_blurred().detect(jpeg(), working_size=0)


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"", "empty"), (b"a letter, not a photo", "unreadable"), (jpeg()[:400], "truncated")],
)
def test_a_broken_photo_is_an_error_that_says_why_not_a_blurred_photo(data, status, tmp_path):
    with pytest.raises(ValueError, match=f"the photo is {status}: "):
        bright_is_blurred().detect(data)
    (tmp_path / "broken.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=rf"broken\.jpg is {status}: "):
        bright_is_blurred().detect(tmp_path / "broken.jpg")
