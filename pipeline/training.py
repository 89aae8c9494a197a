"""Data-parallel training: Ray Data cuts and varies the crops, Ray Train runs the steps.

The driver plans all epochs as one stream of (pass, shard) items. Tasks decode a shard and emit its crops,
seeded by (seed, pass, photo, copy), so the network's workers only compute. A killed run goes on from its
last epoch when the same command is given again.
"""

import contextlib
import hashlib
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data
import ray.train
import safetensors
import safetensors.torch
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn

from bdnet.augment import random_crop
from bdnet.detect import DEFAULT_THRESHOLDS
from bdnet.encoder import InitReport, load_imagenet, load_state
from bdnet.int8 import INT8_ARCHITECTURES, can_measure_ranges, measure_ranges
from bdnet.losses import IGNORED_KIND
from bdnet.networks import build
from bdnet.output import BLUR_KINDS
from bdnet.recipes import Recipe
from pipeline import models, storage
from pipeline.cluster import Shares, check_gpus, quiet_ray_data, signals_kept, trainings_at_once
from pipeline.patches import decode_patch, manifest_digest, read_shard, shard_uris
from pipeline.progress import duration
from pipeline.train_loop import LoopConfig, read_checkpoint, train_loop

CROPS_AHEAD_BYTES = 1 << 30
LOWEST_PRIORITY = 19
# Folds that train at once share torch's random state.
_SEEDED = threading.Lock()
# From so many the ranges of an int8 model are measured.
RANGE_PATCHES = 64
# More of the weights after the first step in a running mean is worth a word.
UNTRAINED_SHARE = 0.05


@dataclass(frozen=True)
class TrainingSettings:
    """What to train and where. ``init`` is "imagenet", "none", a path or URI of an encoder's weights, or a
    trained model."""

    patches: str
    out: str
    arch: str
    recipe: Recipe
    init: str
    workers: int
    seed: int
    # Every how manieth photo of each kind is held out (0: none), and which of the folds this run holds out.
    validation_folds: int
    fold: int
    terms: str
    command: str


@dataclass(frozen=True)
class Plan:
    """Which photos train, which validate, and how long an epoch is."""

    shards: tuple[str, ...]
    validation: tuple[str, ...]
    copies: dict[str, int]  # crops of a patch in one pass over the patches, by kind
    crops_per_pass: int
    crops_per_epoch: int
    photos: int
    patches: int
    photos_digest: str  # of the names of all photos, those held out too


def photos_digest(names: Iterable[str]) -> str:
    """sha256 of photos' names: by them a trained model knows its photos again, however they were cut."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def plan(patches: str, recipe: Recipe, folds: int, fold: int) -> Plan:
    """Read which photos a patch dataset holds and divide them: by photo, never by patch.

    Raises:
        ValueError: no such dataset, photos of another split than ``train``, or too few of them.
    """
    shards = shard_uris(patches)
    rows = pa.concat_tables([read_shard(uri, ["photo", "kind", "split"]) for uri in shards]).to_pylist()
    other = sorted({row["split"] for row in rows} - {"train"})
    if other:
        raise ValueError(
            f"{patches} holds photos of split {', '.join(other)}; train on the split train alone"
        )
    kinds = {row["photo"]: row["kind"] for row in rows}
    validation = validation_photos(kinds, folds, fold) if folds else ()
    training = Counter(row["kind"] for row in rows if row["photo"] not in set(validation))
    if not training or (folds and not validation):
        raise ValueError(
            f"{patches} holds {len(kinds)} photos, too few to hold out one in {folds}; "
            "add some, or use --all-photos"
        )
    most = max(training.values())
    copies = {kind: round(most / n) if recipe.balance_kinds else 1 for kind, n in training.items()}
    crops_per_pass = sum(copies[kind] * n for kind, n in training.items())
    return Plan(
        shards=tuple(shards),
        validation=validation,
        copies=copies,
        crops_per_pass=crops_per_pass,
        crops_per_epoch=recipe.crops_per_epoch or crops_per_pass,
        photos=len(kinds) - len(validation),
        patches=training.total(),
        photos_digest=photos_digest(kinds),
    )


def validation_photos(kinds: dict[str, str], folds: int, fold: int) -> tuple[str, ...]:
    """Names of the photos that fold ``fold`` of ``folds`` holds out: the same share of each kind.

    The choice depends on the names alone: each photo is on the same side in every cut.
    """
    chosen: list[str] = []
    for kind in BLUR_KINDS:
        names = [name for name, its_kind in kinds.items() if its_kind == kind]
        names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        chosen += names[fold::folds]
    return tuple(sorted(chosen))


def passes(the_plan: Plan, epochs: range) -> range:
    """The passes over the patches from which the crops of ``epochs`` are cut."""
    first = epochs.start * the_plan.crops_per_epoch // the_plan.crops_per_pass
    return range(first, -(-epochs.stop * the_plan.crops_per_epoch // the_plan.crops_per_pass))


def crops(the_plan: Plan, recipe: Recipe, seed: int, epochs: range, cpus: float) -> ray.data.Dataset:
    """All crops of ``epochs`` as one dataset: image uint8 C×C×3, mask uint8 C×C (1 = blurred), kind int64."""
    shards = the_plan.shards
    items = []
    for one_pass in passes(the_plan, epochs):
        order = np.random.default_rng([seed, one_pass]).permutation(len(shards))
        items += [{"pass": one_pass, "shard": shards[index]} for index in order]
    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        partial(_crop_shard, the_plan=the_plan, recipe=recipe, seed=seed),
        batch_size=1,
        num_cpus=cpus,
    )


def _crop_shard(
    item: dict[str, np.ndarray], the_plan: Plan, recipe: Recipe, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    # A step waits for its slowest thread: crops are cut in what the steps leave of the cores.
    os.setpriority(os.PRIO_PROCESS, 0, LOWEST_PRIORITY)
    yield from crops_of(str(item["shard"][0]), int(item["pass"][0]), the_plan, recipe, seed)


def crops_of(
    shard: str, one_pass: int, the_plan: Plan, recipe: Recipe, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the crops of one shard in one pass, those of a patch together; see ``crops``."""
    held_out = set(the_plan.validation)
    for index, row in enumerate(read_shard(shard).to_pylist()):
        if row["photo"] in held_out:
            continue
        image, mask = decode_patch(row)
        key = hashlib.sha256(f"{row['photo']}/{row['left']}/{row['top']}/{row['width']}/{index}".encode())
        entropy = int.from_bytes(key.digest()[:8], "big")
        made = []
        for copy in range(the_plan.copies[row["kind"]]):
            rng = np.random.default_rng([seed, one_pass, copy, entropy])
            crop, crop_mask, kind = random_crop(image, mask, row["kind"], recipe.augmentation, rng)
            truth = (crop_mask > 0).astype(np.uint8)
            has_kind = truth.mean() >= DEFAULT_THRESHOLDS.kind_from
            made.append((crop, truth, BLUR_KINDS.index(kind) if has_kind else IGNORED_KIND))
        images, masks, kinds = zip(*made, strict=True)
        yield {"image": np.stack(images), "mask": np.stack(masks), "kind": np.array(kinds, np.int64)}


class Start(NamedTuple):
    """A network before its first step, the names of its tensors that were trained before, and by whom."""

    net: nn.Module
    pretrained: tuple[str, ...]
    said: str


def initial_network(arch: str, init: str, seed: int = 0) -> Start:
    """Build the network and fill its encoder from ImageNet weights or a file, all of it from a trained model,
    or nothing.

    Raises:
        ValueError: the weights are missing or don't fit.
    """
    with _SEEDED:
        torch.manual_seed(seed)  # what the initial weights leave out starts at random
        net = build(arch)
    if init == "none":
        return Start(net, (), "from scratch")
    if init == "imagenet":
        return _encoder_filled(net, load_imagenet(net.get_submodule("encoder")))
    if _is_model(init):
        trained, card = models.read_network(init)
        # A decoder may be a part of the trained one; an encoder with blocks left out makes no sense.
        needed = net.state_dict().keys() | _encoder_names(trained)
        try:
            net.load_state_dict({name: t for name, t in trained.state_dict().items() if name in needed})
        except RuntimeError as error:
            raise ValueError(
                f"the weights of {init}, a {card.arch}, don't fit {arch}: give --arch {card.arch}, or weights"
                " of an encoder as .safetensors"
            ) from error
        said = f"all weights from {init.rstrip('/').rsplit('/', 1)[-1]} ({card.digest[:12]})"
        if unused := trained.state_dict().keys() - needed:
            layers = sorted({name.rsplit(".", 1)[0] for name in unused})
            said += f", which has layers that {arch} lacks: {', '.join(layers)}"
        return Start(net, tuple(net.state_dict()), said)
    try:
        state = safetensors.torch.load(storage.read_bytes(init))
    except FileNotFoundError as error:
        raise ValueError(f"no weights at {init}; give a .safetensors file, imagenet or none") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"{init} holds no weights ({error}); copy or download it again") from error
    return _encoder_filled(net, load_state(net.get_submodule("encoder"), state, init.rsplit("/", 1)[-1]))


def _encoder_names(net: nn.Module) -> set[str]:
    """Names of the encoder's tensors in a whole network."""
    return {name for name in net.state_dict() if name.startswith("encoder.")}


def _encoder_filled(net: nn.Module, report: InitReport) -> Start:
    return Start(net, tuple(f"encoder.{name}" for name in report.loaded), str(report))


def _is_model(init: str) -> bool:
    """Whether a start is a whole trained model, a shipped one's name or a folder of one."""
    return init not in ("none", "imagenet") and not init.endswith(".safetensors")


def check_unseen(init: str, the_plan: Plan) -> str | None:
    """Refuse to begin with a model that was trained on photos that validate now.

    Returns:
        a warning, where that can't be told because it was trained on another set of photos.

    Raises:
        ValueError: it was.
    """
    if not the_plan.validation or not _is_model(init):
        return None
    data = models.read_card(init).data
    if data.get("photos_digest") != the_plan.photos_digest:
        return f"scores mean nothing if {init} was trained on the photos that validate now"
    if not set(the_plan.validation) <= set(data["validation_photos"]):
        raise ValueError(
            f"{init} was trained on photos that this run holds out, and their scores would mean nothing. Use"
            " --all-photos, or begin each fold with the model of the same fold: --init OUT/fold-{fold}/model"
        )
    return None


def train(settings: TrainingSettings, shares: Shares) -> dict[str, Any]:
    """Train one network and export it as a model under ``settings.out``/model.

    Raises:
        ValueError: the patches, the architecture or the initial weights are wrong, or ``settings.out`` holds
            a training with other settings.
    """
    recipe = settings.recipe
    the_plan = plan(settings.patches, recipe, settings.validation_folds, settings.fold)
    steps_per_epoch = the_plan.crops_per_epoch // (recipe.batch_size * settings.workers)
    if not steps_per_epoch:
        raise ValueError(
            f"an epoch of {the_plan.crops_per_epoch} crops is less than one batch of {recipe.batch_size} on "
            f"{settings.workers} workers; use fewer workers or more patches"
        )
    if (left := recipe.ema ** (recipe.epochs * steps_per_epoch)) > UNTRAINED_SHARE:
        print(
            f"the exported mean of weights will hold {left:.0%} of those after the first step: give more"
            " --epochs, or fewer --workers",
            file=sys.stderr,
        )
    if warning := check_unseen(settings.init, the_plan):
        print(warning, file=sys.stderr)
    net, pretrained, said = initial_network(settings.arch, settings.init, settings.seed)
    print(f"start: {said}", file=sys.stderr)
    start = f"{settings.out}/start.safetensors"
    config = LoopConfig(
        arch=settings.arch,
        recipe=recipe,
        start=start,
        pretrained=pretrained,
        steps_per_epoch=steps_per_epoch,
        shards=the_plan.shards,
        validation=the_plan.validation,
        seed=settings.seed,
        checkpoint=f"{settings.out}/checkpoint.pt",
        progress=f"{settings.out}/progress.json",
        fingerprint=_fingerprint(settings, the_plan),
    )
    checkpoint = read_checkpoint(config)
    if checkpoint is None:
        storage.write_bytes(start, safetensors.torch.save(net.state_dict()))
    if checkpoint is None or checkpoint["epoch"] < recipe.epochs:
        with _said_aloud(config):
            _fit(config, the_plan, settings, shares)
        checkpoint = read_checkpoint(config)
    assert checkpoint is not None
    assert checkpoint["epoch"] == recipe.epochs
    net.load_state_dict(checkpoint["averaged"] or checkpoint["network"])
    metrics = checkpoint["metrics"]
    storage.write_bytes(f"{settings.out}/history.json", json.dumps(checkpoint["history"]).encode())
    card_fields = _card(settings, the_plan, said, metrics)
    if settings.arch in INT8_ARCHITECTURES and can_measure_ranges():
        card_fields["ranges"] = measure_ranges(net, _some_patches(the_plan, recipe.working_size))
    elif settings.arch in INT8_ARCHITECTURES:
        print("this torch has no oneDNN: the model will not run in int8 anywhere", file=sys.stderr)
    folder = f"{settings.out}/model"
    card = models.save(net, folder, card_fields)
    return {
        "model": folder,
        "digest": card.digest,
        "val_mean_iou": metrics.get("val_mean_iou"),
        "epochs": recipe.epochs,
        "loss": metrics["loss"],
        "samples_per_second": metrics["samples_per_second"],
    }


def _some_patches(the_plan: Plan, working_size: int) -> Iterator[torch.Tensor]:
    """Yield training patches from all over the dataset, uint8 1×H×W×3 at working size."""
    held_out, seen = set(the_plan.validation), 0
    for shard in the_plan.shards:
        for row in read_shard(shard).to_pylist():
            if row["photo"] in held_out:
                continue
            if seen * RANGE_PATCHES % the_plan.patches < RANGE_PATCHES:
                yield torch.from_numpy(decode_patch(row, working_size)[0])[None]
            seen += 1


def train_folds(settings: TrainingSettings, shares: Shares) -> list[dict[str, Any]]:
    """Train one network for each validation fold, under OUT/fold-K; as many at once as fit.

    Raises:
        ValueError: as ``train``; a start that fits one of the folds alone is refused before any begins.
    """
    folds = range(settings.validation_folds)
    each = [
        replace(
            settings,
            out=f"{settings.out}/fold-{fold}",
            fold=fold,
            init=settings.init.replace("{fold}", str(fold)),
        )
        for fold in folds
    ]
    for one in each if _is_model(settings.init) else []:
        check_unseen(one.init, plan(one.patches, one.recipe, one.validation_folds, one.fold))
    at_once = min(len(each), trainings_at_once(settings.workers))
    if at_once == 1:
        return [train(one, shares) for one in each]
    pool = ThreadPoolExecutor(at_once)
    trainings = [pool.submit(train, one, shares) for one in each]
    try:
        for ended in as_completed(trainings):
            ended.result()
    finally:
        # When one fails, or the job is told to end, the others end with Ray; their checkpoints stay.
        pool.shutdown(wait=False, cancel_futures=True)
    return [training.result() for training in trainings]


def _fit(config: LoopConfig, the_plan: Plan, settings: TrainingSettings, shares: Shares) -> None:
    def remaining_crops() -> ray.data.Dataset:
        # Called whenever the workers start, so that a restart goes on where the checkpoint ends.
        quiet_ray_data()  # this runs in Ray Train's controller
        checkpoint = read_checkpoint(config)
        epochs = range(checkpoint["epoch"] if checkpoint else 0, settings.recipe.epochs)
        return crops(the_plan, settings.recipe, settings.seed, epochs, shares.decode_cpus)

    check_gpus(settings.workers)
    use_gpu = shares.detector_gpus > 0
    # Crops wait in the object store: enough to never starve a step, not all that fit.
    ahead = ray.data.ExecutionResources(object_store_memory=CROPS_AHEAD_BYTES)
    options = ray.data.ExecutionOptions(preserve_order=True, resource_limits=ahead)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"config": config},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": shares.detector_cpus, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            storage_path=f"{settings.out}/ray",
            failure_config=ray.train.FailureConfig(max_failures=3),
        ),
        dataset_config=ray.train.DataConfig(execution_options=options),
        datasets={"train": remaining_crops},
    )
    with signals_kept():
        try:
            result = trainer.fit()
        except SystemExit as ended:  # what Ray Train makes of Ctrl+C, with the code of success
            raise KeyboardInterrupt from ended
    if result.error is not None:
        raise result.error


@contextlib.contextmanager
def _said_aloud(config: LoopConfig) -> Iterator[None]:
    """Say each epoch on stderr while the workers train; they run elsewhere and leave word in a file."""
    finished = threading.Event()
    name = config.progress.rsplit("/", 2)[-2]

    def progress() -> dict[str, Any]:
        try:
            return json.loads(storage.read_bytes(config.progress))
        except FileNotFoundError:
            return {"epoch": 0}

    def watch(said: int) -> None:
        while not finished.wait(2):
            try:
                now = progress()
            except OSError:
                continue  # training doesn't need it; the next time it may be read
            if now["epoch"] == said:
                continue
            said = now["epoch"]
            score = f"val mean IoU {now['val_mean_iou']:.4f}, " if "val_mean_iou" in now else ""
            print(
                f"{name}: epoch {said} of {config.recipe.epochs}: loss {now['loss']:.4f}, {score}"
                f"{now['samples_per_second']} crops/s, {duration(now['seconds_left'])} left",
                file=sys.stderr,
                flush=True,
            )

    thread = threading.Thread(target=watch, args=(progress()["epoch"],), daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _fingerprint(settings: TrainingSettings, the_plan: Plan) -> str:
    """What must not change between a run and its resumption."""
    fixed = [settings.arch, asdict(settings.recipe), settings.init, settings.seed, settings.workers]
    fixed += [asdict(the_plan), manifest_digest(settings.patches)]
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _card(settings: TrainingSettings, the_plan: Plan, start: str, metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "arch": settings.arch,
        "working_size": settings.recipe.working_size,
        "data": {
            "patches": settings.patches.rstrip("/").rsplit("/", 1)[-1],
            "patches_digest": manifest_digest(settings.patches),
            "photos_digest": the_plan.photos_digest,
            "split": "train",
            "training_photos": the_plan.photos,
            "training_patches": the_plan.patches,
            "validation_photos": list(the_plan.validation),
            "terms": settings.terms,
        },
        "training": {
            "command": settings.command,
            "recipe": asdict(settings.recipe),
            "init": start,
            "seed": settings.seed,
            "workers": settings.workers,
            "crops_per_epoch": the_plan.crops_per_epoch,
            "samples_per_second": metrics["samples_per_second"],
            "exported": f"{_exported(settings.recipe)}.",
        },
        "scores": {"validation": {name: metrics[name] for name in metrics if name.startswith("val_")}},
    }


def _exported(recipe: Recipe) -> str:
    if recipe.runs > 1:
        return f"The mean of the last weights of {recipe.runs} runs from the same start"
    return "The running mean of the weights" if recipe.ema else "The weights after the last epoch"
