"""What a worker of a training computes: steps, averages, going on after a kill, scores beside another one."""

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import ray.train.torch
import safetensors.torch
import torch

from bdnet.card import Card
from bdnet.metrics import scores
from bdnet.model import Model
from bdnet.networks import build
from bdnet.recipes import default, paper
from pipeline import train_loop
from pipeline.patches import decode_patch, read_shard
from pipeline.scoring import score
from pipeline.train_loop import LoopConfig, read_checkpoint
from tests.pipeline.test_training import loop_config, patch, write_patches

ARCH = "bdnet-topdown-slim"  # of all networks the one with the smallest checkpoint
STEPS_PER_EPOCH = 1
PHOTOS = "abc"


class KilledError(Exception):
    """Stands for a worker's end between two epochs."""


def batch(seed: int, side: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=rng),
        "mask": torch.randint(0, 2, (2, side, side), dtype=torch.uint8, generator=rng),
        "kind": torch.tensor([0, 1]),
    }


def write_start(folder: Path) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(ARCH)
    start = str(folder / "start.safetensors")
    safetensors.torch.save_file(net.state_dict(), start)
    return start


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop as the only worker, in this process, with a batch for each step that depends on it alone."""

    def batches(config: LoopConfig, world: int) -> Iterator[dict[str, torch.Tensor]]:
        done = (read_checkpoint(config) or {"epoch": 0})["epoch"]
        yield from (batch(step, side=32) for step in range(done * STEPS_PER_EPOCH, 100))

    context = SimpleNamespace(
        get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_world_size=lambda: 1
    )
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "report", lambda metrics: None)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda net: net)
    monkeypatch.setattr(train_loop, "_batches", batches)


@pytest.mark.parametrize(
    ("changes", "averages"),
    [({"ema": 0.9}, 4), ({"ema": 0.0, "runs": 2}, 2)],
    ids=["running mean", "two runs"],
)
def test_a_training_that_was_killed_ends_as_one_that_was_not(
    changes: dict[str, Any], averages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None
) -> None:
    recipe = replace(default(), epochs=4, batch_size=2, **changes)
    start = write_start(tmp_path)
    whole, broken = (
        loop_config(
            tmp_path / name,
            arch=ARCH,
            recipe=recipe,
            start=start,
            pretrained=(),
            steps_per_epoch=STEPS_PER_EPOCH,
        )
        for name in ("whole", "broken")
    )
    train_loop.train_loop({"config": whole})

    def die(metrics: dict[str, Any]) -> None:
        if metrics["epoch"] == 3:
            raise KilledError

    with monkeypatch.context() as killing:
        killing.setattr(ray.train, "report", die)
        with pytest.raises(KilledError):
            train_loop.train_loop({"config": broken})
    train_loop.train_loop({"config": broken})
    ends = [torch.load(config.checkpoint, weights_only=True) for config in (whole, broken)]
    for part in ("network", "averaged", "averages", "optimizer", "schedule"):
        torch.testing.assert_close(ends[0][part], ends[1][part], rtol=0, atol=0, msg=part)
    assert ends[0]["averages"] == averages
    begun = safetensors.torch.load_file(start)
    assert not torch.equal(ends[0]["averaged"]["encoder.conv1.weight"], begun["encoder.conv1.weight"])


def test_progress_tells_a_validation_score_in_the_epoch_that_validated_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None
) -> None:
    told = []
    config = loop_config(
        tmp_path,
        arch=ARCH,
        recipe=replace(default(), epochs=4, batch_size=2),
        start=write_start(tmp_path),
        pretrained=(),
        steps_per_epoch=STEPS_PER_EPOCH,
        validation=("a",),
    )
    monkeypatch.setattr(train_loop, "VALIDATE_EVERY", 2)
    monkeypatch.setattr(train_loop, "_validate", lambda *_: {"val_mean_iou": 0.5})
    monkeypatch.setattr(
        ray.train, "report", lambda _: told.append(json.loads(Path(config.progress).read_text()))
    )
    train_loop.train_loop({"config": config})
    assert ["val_mean_iou" in now for now in told] == [False, True, False, True]


def work_as_one_of_two(rank: int, folder: str) -> None:
    """The loop as one of two workers, each with batches of its own; what it ends with goes into a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    said: list[dict[str, Any]] = []
    context = SimpleNamespace(
        get_world_rank=lambda: rank, get_world_size=lambda: 2, get_local_world_size=lambda: 2
    )
    ray.train.get_context = lambda: context
    ray.train.report = said.append
    ray.train.torch.get_device = lambda: torch.device("cpu")
    ray.train.torch.prepare_model = torch.nn.parallel.DistributedDataParallel
    nets: list[torch.nn.Module] = []
    ours = train_loop.build

    def build_and_keep(arch: str) -> torch.nn.Module:
        nets.append(ours(arch))
        return nets[-1]

    train_loop.build = build_and_keep
    train_loop._batches = lambda config, world: (batch(2 * step + rank, side=64) for step in range(100))
    config = loop_config(
        Path(folder),
        arch=ARCH,
        recipe=replace(paper(), epochs=1, frozen_epochs=0, batch_size=2, learning_rate=0.05),
        start=f"{folder}/start.safetensors",
        steps_per_epoch=STEPS_PER_EPOCH,
        shards=(f"{folder}/patches/shard-00000.parquet",),
        validation=tuple(PHOTOS),
        pretrained=(),
    )
    train_loop.train_loop({"config": config})
    weights = {name: value.detach().numpy() for name, value in nets[0].named_parameters()}
    Path(f"{folder}/rank{rank}.pickle").write_bytes(pickle.dumps((weights, said[-1])))
    torch.distributed.destroy_process_group()


@pytest.mark.long
def test_two_workers_end_with_the_same_weights_and_the_score_of_what_is_exported(tmp_path: Path) -> None:
    write_start(tmp_path)
    rows = [patch(name, "motion", left=left) for left, name in enumerate([*PHOTOS, "trained"])]
    write_patches(tmp_path / "patches", rows)
    torch.multiprocessing.spawn(work_as_one_of_two, (str(tmp_path),), nprocs=2)
    (weights, said), (others, _) = (
        pickle.loads((tmp_path / f"rank{rank}.pickle").read_bytes()) for rank in range(2)
    )
    assert all((weights[name] == others[name]).all() for name in weights)

    exported = build(ARCH)
    exported.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["network"])
    model = Model(exported, Card(ARCH, ""), "cpu")
    matrices = []
    for row in read_shard(str(tmp_path / "patches/shard-00000.parquet")).to_pylist():
        if row["photo"] in PHOTOS:
            image, mask = decode_patch(row, default().working_size)
            matrices.append(score(model.probability(image), mask > 0, "0.5")[0])
    assert said["val_mean_iou"] == pytest.approx(scores(sum(matrices))["mean_iou"])
