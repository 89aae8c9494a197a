"""What each training worker runs: steps over its share of the crops, validation, one checkpoint an epoch."""

import copy
import io
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_avg_fn

from bdnet.card import Card
from bdnet.losses import bdnet_loss
from bdnet.memory import keep_freed_memory
from bdnet.metrics import scores
from bdnet.model import Model, has_fast_bfloat16
from bdnet.networks import build
from bdnet.preprocess import normalize
from bdnet.recipes import Recipe
from pipeline import storage
from pipeline.patches import decode_patch, read_shard
from pipeline.scoring import score

SHUFFLE_BUFFER = 512  # crops
VALIDATE_EVERY = 5  # epochs; the last one always; of several runs the last one of each


@dataclass(frozen=True)
class LoopConfig:
    """Everything a worker needs. ``pretrained`` names the tensors that were trained before."""

    arch: str
    recipe: Recipe
    start: str
    pretrained: tuple[str, ...]
    steps_per_epoch: int
    shards: tuple[str, ...]
    validation: tuple[str, ...]
    seed: int
    checkpoint: str
    progress: str
    fingerprint: str


def read_checkpoint(config: LoopConfig) -> dict[str, Any] | None:
    """Read the run's checkpoint: weights, optimizer, schedule, and what each epoch gave.

    Raises:
        ValueError: it belongs to a training with other settings.
    """
    try:
        data = storage.read_bytes(config.checkpoint)
    except FileNotFoundError:
        return None
    checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if checkpoint["fingerprint"] != config.fingerprint:
        raise ValueError(
            f"{config.checkpoint} belongs to a training with other settings; give the same ones to go on, "
            "or choose another --out"
        )
    return checkpoint


def train_loop(loop_config: dict[str, LoopConfig]) -> None:
    """Train from the checkpoint, if there is one, to the last epoch."""
    config = loop_config["config"]
    recipe = config.recipe
    rank = ray.train.get_context().get_world_rank()
    world = ray.train.get_context().get_world_size()
    device = ray.train.torch.get_device()
    # Ray takes threads from a worker's logical CPUs; the cores are for this node's workers to share.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ray.train.get_context().get_local_world_size()))
    keep_freed_memory()

    net = build(config.arch)
    start = safetensors.torch.load(storage.read_bytes(config.start))
    net.load_state_dict(start)
    net.to(device).to(memory_format=torch.channels_last)
    averaged = _averaged(net, recipe)
    optimizer = _optimizer(net, config)
    schedule = _schedule(optimizer, config)
    checkpoint = read_checkpoint(config)
    metrics: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    if checkpoint:
        net.load_state_dict(checkpoint["network"])
        if averaged:
            averaged.module.load_state_dict(checkpoint["averaged"])
            averaged.n_averaged.fill_(checkpoint["averages"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        schedule.load_state_dict(checkpoint["schedule"])
        metrics, history = checkpoint["metrics"], checkpoint["history"]
    # All processes hold the same weights already; from now on gradients are averaged, and the statistics of
    # normalisations are those of rank 0's batches.
    parallel = ray.train.torch.prepare_model(net)

    batches = _batches(config, world)
    first = checkpoint["epoch"] if checkpoint else 0
    epochs_of_run = recipe.epochs // recipe.runs
    validate_every = VALIDATE_EVERY if recipe.runs == 1 else epochs_of_run
    began, epochs_began = time.monotonic(), first
    for epoch in range(first, recipe.epochs):
        epoch_of_run = epoch % epochs_of_run
        if epoch and epoch_of_run == 0:
            net.load_state_dict(start)
            optimizer = _optimizer(net, config)
            schedule = _schedule(optimizer, config)
        torch.manual_seed(config.seed * 1_000_003 + epoch * world + rank)  # dropout
        epoch_began = time.monotonic()
        loss = _train_epoch(
            parallel, net, averaged, optimizer, schedule, batches, config, epoch_of_run, device
        )
        if averaged and recipe.runs > 1 and epoch_of_run + 1 == epochs_of_run:
            averaged.update_parameters(net)
        now: dict[str, Any] = {"epoch": epoch + 1, "loss": loss, "seconds": time.monotonic() - epoch_began}
        seconds = time.monotonic() - began
        samples = (epoch + 1 - epochs_began) * config.steps_per_epoch * recipe.batch_size * world
        last = epoch + 1 == recipe.epochs
        if config.validation and (last or (epoch + 1) % validate_every == 0):
            now |= _validate(averaged.module if averaged else net, config, rank, world, device)
        history.append(now)
        rate = {"samples_per_second": round(samples / seconds, 2)}
        metrics |= now | rate
        if rank == 0:
            _write_checkpoint(config, epoch + 1, net, averaged, optimizer, schedule, metrics, history)
            left = seconds / (epoch + 1 - epochs_began) * (recipe.epochs - epoch - 1)
            storage.write_bytes(config.progress, json.dumps({**now, **rate, "seconds_left": left}).encode())
        ray.train.report(metrics)


def _averaged(net: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """What is validated and exported instead of the last weights: their running mean, or the runs' mean."""
    if recipe.ema:
        return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
    if recipe.runs > 1:
        return AveragedModel(net, avg_fn=get_swa_avg_fn(), use_buffers=True)
    return None


def _batches(config: LoopConfig, world: int) -> Iterator[dict[str, torch.Tensor]]:
    """This worker's share of the stream of crops, shuffled within a window; never a short batch."""
    shard = ray.train.get_dataset_shard("train")
    yield from shard.iter_torch_batches(
        batch_size=config.recipe.batch_size,
        drop_last=True,
        prefetch_batches=2,
        local_shuffle_buffer_size=max(config.recipe.batch_size, SHUFFLE_BUFFER // world),
        local_shuffle_seed=config.seed,
    )


def _optimizer(net: nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
    recipe = config.recipe
    groups = []
    for pretrained, rate in (
        (True, recipe.learning_rate * recipe.pretrained_factor),
        (False, recipe.learning_rate),
    ):
        chosen = [p for name, p in net.named_parameters() if (name in config.pretrained) == pretrained]
        if not chosen:
            continue
        # Normalisations and biases are not decayed.
        groups.append({"params": [p for p in chosen if p.ndim > 1], "lr": rate})
        groups.append({"params": [p for p in chosen if p.ndim <= 1], "lr": rate, "weight_decay": 0.0})
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=recipe.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


def _schedule(optimizer: torch.optim.Optimizer, config: LoopConfig) -> torch.optim.lr_scheduler.LRScheduler:
    """A factor on the rates per step: constant, or up over a tenth of a run and down along a cosine."""
    total = config.recipe.epochs // config.recipe.runs * config.steps_per_epoch
    warmup = max(1, total // 10)

    def factor(step: int) -> float:
        if config.recipe.schedule == "constant":
            return 1.0
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _train_epoch(
    parallel: nn.Module,
    net: nn.Module,
    averaged: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batches: Iterator[dict[str, torch.Tensor]],
    config: LoopConfig,
    epoch: int,
    device: torch.device,
) -> float:
    """One epoch; returns the mean loss of this worker."""
    recipe = config.recipe
    parallel.train()
    names = _frozen(config) if epoch < recipe.frozen_epochs else frozenset()
    for name, module in net.named_modules():
        if f"{name}.weight" in names:
            module.eval()  # a normalisation keeps its statistics too
    frozen = [parameter for name, parameter in net.named_parameters() if name in names]
    total = 0.0
    for _ in range(config.steps_per_epoch):
        batch = next(batches)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device)):
            output = parallel(normalize(batch["image"].to(device)))
        loss = bdnet_loss(
            output,
            batch["mask"].to(device).long(),
            batch["kind"].to(device),
            recipe.kind_weight,
            recipe.region_weight,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in frozen:
            parameter.grad = None
        optimizer.step()
        schedule.step()
        if averaged and recipe.ema:
            averaged.update_parameters(net)
        total += loss.item()
    return total / config.steps_per_epoch


def _frozen(config: LoopConfig) -> frozenset[str]:
    """The encoder's tensors that were trained before; its others, still noise, learn from the start."""
    return frozenset(name for name in config.pretrained if name.startswith("encoder."))


def _validate(
    net: nn.Module, config: LoopConfig, rank: int, world: int, device: torch.device
) -> dict[str, float | None]:
    """Scores on the photos held out, each by exactly one worker: one confusion matrix over all pixels."""
    net = copy.deepcopy(net)
    if world > 1:
        # The others' statistics of normalisation are a step from the first one's, which are exported.
        for buffer in net.buffers():
            torch.distributed.broadcast(buffer, 0)
    model = Model(net, Card(arch=config.arch, digest=""), device)
    mine = config.validation[rank::world]
    matrix = np.zeros((2, 2), np.int64)
    for uri in config.shards:
        shard = read_shard(uri)
        for row in shard.filter(pc.is_in(shard["photo"], pa.array(mine, pa.string()))).to_pylist():
            image, mask = decode_patch(row, config.recipe.working_size)
            matrix += score(model.probability(image), mask > 0, "0.5")[0]
    pooled = torch.from_numpy(matrix).to(device)
    if world > 1:
        torch.distributed.all_reduce(pooled)
    return {f"val_{name}": value for name, value in scores(pooled.cpu().numpy()).items()}


def _write_checkpoint(
    config: LoopConfig,
    epoch: int,
    net: nn.Module,
    averaged: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    metrics: dict[str, Any],
    history: list[dict[str, Any]],
) -> None:
    buffer = io.BytesIO()
    torch.save(
        {
            "fingerprint": config.fingerprint,
            "epoch": epoch,
            "network": net.state_dict(),
            "averaged": averaged.module.state_dict() if averaged else None,
            "averages": int(averaged.n_averaged) if averaged else 0,
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "metrics": metrics,
            "history": history,
        },
        buffer,
    )
    storage.write_bytes(config.checkpoint, buffer.getvalue())
