import csv
import io
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from bdnet import model as models
from bdnet.card import read_card, shipped_models
from bdnet.encoder import load_state
from bdnet.losses import IGNORED_KIND
from bdnet.networks import build
from bdnet.recipes import Recipe, default, paper
from pipeline import training
from pipeline.cluster import Node, shares
from pipeline.patches import decode_patch
from pipeline.schema import PATCHES
from pipeline.train_loop import LoopConfig, _averaged, _optimizer, _schedule, _train_epoch, read_checkpoint
from pipeline.training import (
    RANGE_PATCHES,
    Plan,
    TrainingSettings,
    _some_patches,
    check_unseen,
    crops_of,
    initial_network,
    passes,
    photos_digest,
    plan,
    train_folds,
    validation_photos,
)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def patch(photo: str, kind: str, split: str = "train", left: int = 0) -> dict[str, object]:
    rng = np.random.default_rng(len(photo) + left)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :40] = 255
    return {
        "photo": photo,
        "kind": kind,
        "split": split,
        "cut": "blurdb1",
        "left": left,
        "top": 0,
        "width": 64,
        "height": 64,
        "blurred_fraction": 40 / 64,
        "image": png(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)),
        "mask": png(mask),
    }


def write_patches(folder: Path, rows: list[dict[str, object]]) -> str:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=PATCHES), folder / "shard-00000.parquet")
    (folder / "dataset.json").write_text('{"shards": ["shard-00000.parquet"]}')
    return str(folder)


def twenty_photos() -> list[dict[str, object]]:
    rows = [patch(f"motion{i:02}", "motion") for i in range(5)]
    return rows + [patch(f"defocus{i:02}", "defocus", left=j) for i in range(15) for j in range(2)]


def test_validation_holds_out_whole_photos_and_the_same_share_of_each_kind(tmp_path: Path) -> None:
    the_plan = plan(write_patches(tmp_path / "patches", twenty_photos()), paper(), folds=5, fold=0)
    kinds = [name.rstrip("0123456789") for name in the_plan.validation]
    assert kinds.count("motion") == 1
    assert kinds.count("defocus") == 3
    # Both patches of a held-out photo are gone: 4 motion and 12 · 2 defocus patches remain.
    assert the_plan.patches == the_plan.crops_per_epoch == 4 + 24
    assert the_plan.photos == 16


def test_folds_are_disjoint_and_hold_out_every_photo_once() -> None:
    kinds = {f"m{i}": "motion" for i in range(20)} | {f"d{i}": "defocus" for i in range(31)}
    held_out = [validation_photos(kinds, 3, fold) for fold in range(3)]
    assert sorted(sum(held_out, ())) == sorted(kinds)


def test_a_photo_is_on_the_same_side_whatever_the_cut_holds_beside_it() -> None:
    few = {f"m{i}": "motion" for i in range(10)}
    more = few | {f"d{i}": "defocus" for i in range(10)}
    assert set(validation_photos(few, 5, 0)) == {
        name for name in validation_photos(more, 5, 0) if name in few
    }


def test_balancing_shows_the_rarer_kind_more_often(tmp_path: Path) -> None:
    the_plan = plan(write_patches(tmp_path / "patches", twenty_photos()), default(), folds=5, fold=0)
    assert the_plan.copies == {"motion": 6, "defocus": 1}
    assert the_plan.crops_per_epoch == 4 * 6 + 24


def test_without_folds_every_photo_trains_and_none_validates(tmp_path: Path) -> None:
    the_plan = plan(write_patches(tmp_path / "patches", twenty_photos()), paper(), folds=0, fold=0)
    assert the_plan.validation == ()
    assert the_plan.photos == 20


def test_an_epoch_of_a_given_length_takes_the_passes_it_needs(tmp_path: Path) -> None:
    folder = write_patches(tmp_path / "patches", twenty_photos())
    natural = plan(folder, paper(), folds=0, fold=0)  # 35 patches
    assert list(passes(natural, range(2, 5))) == [2, 3, 4]
    fixed = plan(folder, replace(paper(), crops_per_epoch=80), folds=0, fold=0)
    assert (fixed.crops_per_epoch, fixed.crops_per_pass) == (80, 35)
    assert list(passes(fixed, range(0, 2))) == [0, 1, 2, 3, 4]  # 160 crops of 175
    assert list(passes(fixed, range(1, 2))) == [2, 3, 4]


def test_photos_of_another_split_are_refused(tmp_path: Path) -> None:
    rows = [*twenty_photos(), patch("leak", "motion", split="test")]
    with pytest.raises(ValueError, match="holds photos of split test"):
        plan(write_patches(tmp_path / "patches", rows), paper(), folds=5, fold=0)


def test_an_unfinished_patch_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no complete patch dataset"):
        plan(str(tmp_path), paper(), folds=5, fold=0)


def crop_all(folder: str, held_out: frozenset[str], epoch: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    recipe = replace(paper(), augmentation=replace(paper().augmentation, crop=48))
    the_plan = Plan(
        shards=(f"{folder}/shard-00000.parquet",),
        validation=tuple(held_out),
        copies={"motion": 2, "defocus": 1},
        crops_per_pass=1,
        crops_per_epoch=1,
        photos=1,
        patches=1,
        photos_digest="",
    )
    return list(crops_of(the_plan.shards[0], epoch, the_plan, recipe, seed))


def test_crops_leave_out_what_validates_and_repeat_what_is_rare(tmp_path: Path) -> None:
    folder = write_patches(
        tmp_path / "patches", [patch("a", "motion"), patch("b", "defocus"), patch("c", "motion")]
    )
    made = crop_all(folder, frozenset({"c"}), epoch=0)
    assert [batch["image"].shape for batch in made] == [(2, 48, 48, 3), (1, 48, 48, 3)]
    assert [batch["kind"].tolist() for batch in made] == [[0, 0], [1]]
    assert set(np.unique(made[0]["mask"])) == {0, 1}


def test_ranges_come_from_training_patches_all_over_the_dataset(tmp_path: Path) -> None:
    rows = [patch(f"motion{i:03}", "motion", left=i) for i in range(150)]  # 100 train: no multiple of 64
    folder = write_patches(tmp_path / "patches", rows)
    the_plan = plan(folder, paper(), folds=3, fold=0)
    chosen = list(_some_patches(the_plan, 32))
    assert len(chosen) == RANGE_PATCHES
    assert {tuple(image.shape) for image in chosen} == {(1, 32, 32, 3)}
    training = [row for row in rows if row["photo"] not in the_plan.validation]
    pixels = [decode_patch(row, 32)[0].tobytes() for row in training]
    places = [pixels.index(image[0].numpy().tobytes()) for image in chosen]
    assert {after - before for before, after in itertools.pairwise(places)} <= {1, 2}
    assert places[-1] >= len(training) - 2


def test_networks_begun_at_once_start_as_each_would_alone() -> None:
    def first_weight(seed: int) -> torch.Tensor:
        return next(initial_network("bdnet-resnet18", "none", seed).net.parameters())

    alone = [first_weight(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(first_weight, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, at_once, strict=True))


def to_train(**chosen: Any) -> TrainingSettings:
    """A training's settings, with what a test chooses."""
    usual = TrainingSettings(
        patches="patches",
        out="out",
        arch="bdnet-topdown-slim",
        recipe=default(),
        init="none",
        workers=1,
        seed=0,
        validation_folds=0,
        fold=0,
        terms="",
        command="",
    )
    return replace(usual, **chosen)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        pytest.param(default(), "will hold 62% of those after the first step", id="240 steps"),
        pytest.param(replace(default(), epochs=600), "", id="2,400 steps"),
        pytest.param(paper(), "", id="without a mean"),
    ],
)
def test_a_mean_of_too_few_steps_is_said_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: Recipe, said: str
) -> None:
    patches = write_patches(tmp_path / "patches", twenty_photos())
    settings = to_train(patches=patches, recipe=recipe, init="nowhere.safetensors", validation_folds=5)
    with pytest.raises(ValueError, match="no weights at nowhere"):
        training.train(settings, shares([Node(4)]))
    err = capsys.readouterr().err
    assert said in err
    assert ("will hold" in err) == bool(said)


def test_each_fold_trains_in_its_own_folder_from_its_own_start(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TrainingSettings] = []
    together = threading.Barrier(2)

    def train(settings: TrainingSettings, shares: object) -> dict[str, object]:
        if settings.fold < 2:
            together.wait(30)  # two have room at once
        asked.append(settings)
        return {"model": f"{settings.out}/model"}

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "plan", lambda *its: its)
    monkeypatch.setattr(training, "check_unseen", lambda init, the_plan: None)
    monkeypatch.setattr(training, "trainings_at_once", lambda workers: {3: 2}[workers])
    one = to_train(init="default/fold-{fold}/model", workers=3, validation_folds=3)
    said = train_folds(one, shares([Node(4)]))
    assert [result["model"] for result in said] == [f"out/fold-{k}/model" for k in range(3)]
    asked.sort(key=lambda its: its.fold)
    assert asked == [
        replace(one, fold=k, out=f"out/fold-{k}", init=f"default/fold-{k}/model") for k in range(3)
    ]


def test_a_fold_that_fails_is_told_while_another_still_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    told = threading.Event()

    def train(settings: TrainingSettings, its: object) -> dict[str, object]:
        if settings.fold:
            raise OSError("no room on the disk")
        assert told.wait(30)
        return {}

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "plan", lambda *its: its)
    monkeypatch.setattr(training, "check_unseen", lambda init, the_plan: None)
    monkeypatch.setattr(training, "trainings_at_once", lambda workers: 2)
    try:
        with pytest.raises(OSError, match="no room on the disk"):
            train_folds(to_train(validation_folds=2), shares([Node(4)]))
    finally:
        told.set()


def test_a_start_that_fits_one_fold_alone_is_refused_before_any_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_patches(tmp_path / "patches", twenty_photos())
    of_fold_0 = plan(folder, default(), folds=2, fold=0)
    data = {"photos_digest": of_fold_0.photos_digest, "validation_photos": list(of_fold_0.validation)}
    models.save(build("bdnet-resnet18"), str(tmp_path / "model"), {"arch": "bdnet-resnet18", "data": data})
    monkeypatch.setattr(training, "train", lambda one, shares: pytest.fail("a fold trains"))
    one = to_train(patches=folder, init=str(tmp_path / "model"), validation_folds=2)
    with pytest.raises(
        ValueError, match=r"trained on photos that this run holds out.*--init OUT/fold-\{fold\}"
    ):
        train_folds(one, shares([Node(4)]))


@pytest.mark.parametrize("data", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html></html>"])
def test_a_start_that_holds_no_weights_is_refused(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "encoder.safetensors"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"encoder\.safetensors holds no weights .*download it again"):
        initial_network("bdnet-resnet18", str(file))


def test_the_papers_optimizer_is_sgd_with_nesterov_momentum(tmp_path: Path) -> None:
    optimizer = _optimizer(build("bdnet-resnet18"), loop_config(tmp_path, recipe=paper()))
    assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(0.9, True)}


def test_crops_are_the_same_for_the_same_seed_and_epoch_only(tmp_path: Path) -> None:
    folder = write_patches(tmp_path / "patches", [patch("a", "motion")])
    images = [
        crop_all(folder, frozenset(), epoch, seed)[0]["image"]
        for epoch, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert (images[0] == images[1]).all()
    assert not (images[0] == images[2]).all()
    assert not (images[0] == images[3]).all()
    assert not (images[0][0] == images[0][1]).all()  # the two copies of a motion patch differ


def test_a_crop_with_hardly_any_blur_has_no_kind(tmp_path: Path) -> None:
    sharp = {**patch("a", "motion"), "mask": png(np.zeros((64, 64), np.uint8))}
    made = crop_all(write_patches(tmp_path / "patches", [sharp]), frozenset(), epoch=0)
    assert made[0]["kind"].tolist() == [IGNORED_KIND, IGNORED_KIND]


def loop_config(tmp_path: Path, **changes: object) -> LoopConfig:
    values = {
        "arch": "bdnet-resnet18",
        "recipe": default(),
        "start": "",
        "pretrained": ("encoder.conv1.weight", "encoder.bn1.weight"),
        "steps_per_epoch": 10,
        "shards": (),
        "validation": (),
        "seed": 0,
        "checkpoint": str(tmp_path / "checkpoint.pt"),
        "progress": str(tmp_path / "progress.json"),
        "fingerprint": "one",
    }
    return LoopConfig(**(values | changes))


def test_pretrained_layers_learn_slower_and_norms_and_biases_do_not_decay(tmp_path: Path) -> None:
    net = build("bdnet-resnet18")
    groups = _optimizer(net, loop_config(tmp_path)).param_groups
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    recipe = default()
    slow = recipe.learning_rate * recipe.pretrained_factor
    assert rates[id(net.encoder.conv1.weight)] == (slow, recipe.weight_decay)
    assert rates[id(net.encoder.bn1.weight)] == (slow, 0.0)
    assert rates[id(net.kind.weight)] == (recipe.learning_rate, recipe.weight_decay)
    assert rates[id(net.kind.bias)] == (recipe.learning_rate, 0.0)
    assert len(rates) == sum(1 for _ in net.parameters())


@pytest.mark.parametrize(("epoch", "stays"), [(0, True), (1, False)])
def test_what_the_encoder_was_loaded_with_is_frozen_and_its_random_rest_learns(
    tmp_path: Path, epoch: int, stays: bool
) -> None:
    net = build("bdnet-resnet18").train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    loaded = {name for name in before if name.startswith("encoder.") and "layer4" not in name}
    recipe = replace(paper(), frozen_epochs=1, learning_rate=0.1)
    config = loop_config(tmp_path, recipe=recipe, pretrained=tuple(loaded), steps_per_epoch=1)
    batch = {
        "image": torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8),
        "mask": torch.randint(0, 2, (2, 64, 64), dtype=torch.uint8),
        "kind": torch.tensor([0, 1]),
    }
    optimizer = _optimizer(net, config)
    schedule = _schedule(optimizer, config)
    _train_epoch(net, net, None, optimizer, schedule, iter([batch]), config, epoch, torch.device("cpu"))
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed.isdisjoint(loaded) == stays
    for learns in ("encoder.layer4.0.conv1.weight", "encoder.layer4.0.bn1.running_mean", "kind.weight"):
        assert learns in changed


def test_one_cycle_rises_to_the_peak_and_falls_to_zero(tmp_path: Path) -> None:
    config = loop_config(tmp_path, recipe=replace(default(), epochs=10))
    optimizer = _optimizer(build("bdnet-resnet18"), config)
    schedule = _schedule(optimizer, config)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[-1]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(default().learning_rate)
    assert rates.index(max(rates)) in range(8, 12)
    assert rates[-1] < 0.01 * default().learning_rate


def test_the_last_weights_of_all_runs_weigh_alike() -> None:
    net = build("bdnet-resnet18")
    averaged = _averaged(net, replace(default(), ema=0.0, epochs=60, runs=3))
    assert averaged is not None
    norm = net.encoder.bn1
    assert isinstance(norm, nn.BatchNorm2d)
    for value in (1.0, 2.0, 6.0):
        nn.init.constant_(norm.weight, value)
        assert norm.running_mean is not None
        norm.running_mean.fill_(value)
        averaged.update_parameters(net)
    mean = averaged.module.encoder.bn1
    assert torch.allclose(mean.weight, torch.tensor(3.0))
    assert torch.allclose(mean.running_mean, torch.tensor(3.0))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    config = loop_config(tmp_path)
    assert read_checkpoint(config) is None
    torch.save({"fingerprint": "another"}, config.checkpoint)
    with pytest.raises(ValueError, match="choose another --out"):
        read_checkpoint(config)


def test_initial_weights_come_from_a_file_and_what_it_lacks_is_told(tmp_path: Path) -> None:
    import safetensors.torch

    donor = build("bdnet-resnet18").encoder
    state = {key: value for key, value in donor.state_dict().items() if not key.startswith("layer4")}
    safetensors.torch.save_file(state, tmp_path / "resnet18.safetensors")
    net, pretrained, said = initial_network("bdnet-resnet18", str(tmp_path / "resnet18.safetensors"))
    assert torch.equal(net.encoder.conv1.weight, donor.conv1.weight)
    assert set(pretrained) == {f"encoder.{name}" for name in state}
    assert said.endswith("from scratch: layer4")
    with pytest.raises(ValueError, match="no weights at"):
        initial_network("bdnet-resnet18", str(tmp_path / "absent.safetensors"))
    with pytest.raises(ValueError, match="no model at"):
        initial_network("bdnet-resnet18", str(tmp_path / "weights.pth"))


def test_training_begins_with_a_trained_model_of_the_same_arch(tmp_path: Path) -> None:
    donor = build("bdnet-resnet18")
    card = models.save(donor, str(tmp_path), {"arch": "bdnet-resnet18"})
    net, pretrained, said = initial_network("bdnet-resnet18", str(tmp_path))
    assert torch.equal(net.kind.weight, donor.kind.weight.half().float())
    assert {name for name, _ in net.named_parameters()} <= set(pretrained)
    assert card.digest[:12] in said
    with pytest.raises(ValueError, match="give --arch bdnet-resnet18"):
        initial_network("bdnet-resnet34", str(tmp_path))


def test_a_part_of_a_trained_decoder_is_a_start_and_a_part_of_an_encoder_is_none(tmp_path: Path) -> None:
    whole = build("bdnet-topdown")
    models.save(whole, str(tmp_path / "whole"), {"arch": "bdnet-topdown"})
    net, pretrained, said = initial_network("bdnet-topdown-slim", str(tmp_path / "whole"))
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name).half().float()), name
        assert name in pretrained
    assert "which has layers that bdnet-topdown-slim lacks: smooths.0.1.0, smooths.0.1.1" in said
    # ResNet-34's first blocks have ResNet-18's names and shapes.
    models.save(build("bdnet-resnet34"), str(tmp_path / "deeper"), {"arch": "bdnet-resnet34"})
    with pytest.raises(ValueError, match="give --arch bdnet-resnet34"):
        initial_network("bdnet-resnet18", str(tmp_path / "deeper"))


def test_a_model_that_was_trained_on_photos_that_are_held_out_is_no_start(tmp_path: Path) -> None:
    patches = write_patches(tmp_path / "patches", twenty_photos())
    first, second = (plan(patches, paper(), folds=5, fold=fold) for fold in (0, 1))
    data = {"photos_digest": first.photos_digest, "validation_photos": list(first.validation)}
    init = str(tmp_path / "model")
    models.save(build("bdnet-resnet18"), init, {"arch": "bdnet-resnet18", "data": data})
    assert check_unseen(init, first) is None
    assert check_unseen(init, plan(patches, paper(), folds=0, fold=0)) is None
    with pytest.raises(ValueError, match="trained on photos that this run holds out"):
        check_unseen(init, second)
    # Cut otherwise and elsewhere they are the same photos.
    cut_otherwise = [patch(str(row["photo"]), str(row["kind"]), left=7) for row in twenty_photos()]
    elsewhere = write_patches(tmp_path / "elsewhere", cut_otherwise)
    with pytest.raises(ValueError, match="trained on photos that this run holds out"):
        check_unseen(init, plan(elsewhere, paper(), folds=5, fold=1))
    others = write_patches(tmp_path / "others", twenty_photos()[1:])
    assert "scores mean nothing if" in (check_unseen(init, plan(others, paper(), folds=4, fold=1)) or "")


@pytest.mark.data
def test_the_shipped_models_know_the_photos_that_they_were_trained_on(data_dir: Path) -> None:
    with (data_dir / "blurraw/index.csv").open(newline="") as file:
        names = [row["name"] for row in csv.DictReader(file) if row["split"] == "train"]
    for name in shipped_models():
        assert read_card(name).data["photos_digest"] == photos_digest(names), name


def test_a_network_initialised_from_itself_reports_nothing_missing() -> None:
    encoder = build("bdnet-resnet18").encoder
    report = load_state(encoder, encoder.state_dict(), "itself")
    assert report.not_in_source == ()
    assert report.not_used == ()


def test_layers_without_initial_weights_are_the_same_for_the_same_seed() -> None:
    heads = [initial_network("bdnet-resnet18", "none", seed)[0].kind.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
