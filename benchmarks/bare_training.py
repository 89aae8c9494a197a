"""What Ray Train is compared with: the same network, loss, optimizer and crops in one plain PyTorch loop.

``python -m benchmarks.bare_training PATCHES --arch NAME --steps N``: torch's DataLoader cuts the crops in two
processes, at the lowest priority as ``jobs.train`` does. No checkpoint, no validation. The last line on
stdout tells crops a second, the first steps apart.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import tyro
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bdnet.losses import bdnet_loss
from bdnet.memory import keep_freed_memory
from bdnet.model import has_fast_bfloat16
from bdnet.networks import build
from bdnet.preprocess import normalize
from bdnet.recipes import default
from pipeline.training import LOWEST_PRIORITY, Plan, crops_of, plan

PROCESSES = 2
WARM_UP = 10  # steps


@dataclass(frozen=True)
class Settings:
    """Train for some steps and forget it."""

    patches: Annotated[str, tyro.conf.Positional]
    """Folder that jobs.prepare wrote."""
    arch: str
    """Network."""
    steps: int = 60
    """Steps to time."""


class Crops(IterableDataset[tuple[np.ndarray, np.ndarray, int]]):
    """The crops that ``jobs.train`` would make, for ever; each process has its share of the shards."""

    def __init__(self, the_plan: Plan) -> None:
        self.plan = the_plan

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        worker = get_worker_info()
        assert worker is not None
        for one_pass in itertools.count():
            for shard in self.plan.shards[worker.id :: worker.num_workers]:
                for made in crops_of(shard, one_pass, self.plan, default(), seed=0):
                    yield from zip(made["image"], made["mask"], made["kind"], strict=True)


def _at_lowest_priority(_: int) -> None:
    os.setpriority(os.PRIO_PROCESS, 0, LOWEST_PRIORITY)


def main() -> int:
    """Train and tell the rate."""
    settings = tyro.cli(Settings, description=__doc__)
    keep_freed_memory()
    recipe, cpu = default(), torch.device("cpu")
    net = build(settings.arch).to(memory_format=torch.channels_last).train()
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.learning_rate, fused=True)
    loader = DataLoader(
        Crops(plan(settings.patches, recipe, 0, 0)),
        recipe.batch_size,
        num_workers=PROCESSES,
        worker_init_fn=_at_lowest_priority,
    )
    began = time.monotonic()
    for step, (images, masks, kinds) in enumerate(loader):
        if step == WARM_UP:
            began = time.monotonic()
        if step == WARM_UP + settings.steps:
            break
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16(cpu)):
            output = net(normalize(images))
        loss = bdnet_loss(output, masks.long(), kinds, recipe.kind_weight, recipe.region_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        averaged.update_parameters(net)
    seconds = time.monotonic() - began
    print(json.dumps({"crops_per_second": settings.steps * recipe.batch_size / seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
