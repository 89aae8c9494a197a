"""A model on disk, ``model.safetensors`` and ``card.json`` in one folder; and in memory, ready to use."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from torch import Tensor, nn

from bdnet.card import CARD_FILE, DEFAULT_MODEL, WEIGHTS_FILE, WORKING_SIZE, Card, read_file, read_folder
from bdnet.detect import Detection, measure
from bdnet.engine import optimize
from bdnet.int8 import has_fast_int8, quantize
from bdnet.networks import build
from bdnet.photo import decode
from bdnet.preprocess import normalize

# Photos that the network is given at once; on a CPU those of 640 pixels, of smaller ones as many more.
CPU_BATCH, GPU_BATCH = 2, 16


class Model:
    """A network with its card on a device, in evaluation mode."""

    def __init__(self, net: nn.Module, card: Card, device: torch.device | str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.card = card
        self.dtype = torch.bfloat16 if has_fast_bfloat16(self.device) else torch.float32
        self.batch = cpu_batch(card) if self.device.type == "cpu" else GPU_BATCH
        self.fused = self.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.int8 = self.fused and bool(card.ranges) and has_fast_int8()
        if self.int8:
            self.net = quantize(net, card.ranges, self.dtype)
        elif self.fused:
            self.net = optimize(net, self.dtype)
        else:
            # Two calls: torch's own types know no call with both.
            self.net = net.eval().to(self.device).to(memory_format=torch.channels_last)

    def predict(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Detect blur in a batch of equal shape.

        Args:
            images: uint8 RGB N×H×W×3.

        Returns:
            probability that a pixel is blurred, float32 N×H×W; probability of (motion, defocus), float32 N×2,
            or None where the network doesn't tell them apart.
        """
        return next(self.predict_all([images]))

    def predict_all(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """``predict`` for batch after batch: a GPU computes one while the next is copied to it, and while the
        caller works on the one before."""
        started: tuple[Tensor, Tensor | None] | None = None
        for images in batches:
            before, started = started, self._start(self._upload(torch.from_numpy(images)))
            if before is not None:
                yield _fetched(before)
        if started is not None:
            yield _fetched(started)

    def _upload(self, images: Tensor) -> Tensor:
        if self.copies is None:
            return images.to(self.device)
        with torch.cuda.stream(self.copies):
            uploaded = images.pin_memory().to(self.device, non_blocking=True)
        compute = torch.cuda.current_stream(self.device)
        compute.wait_event(self.copies.record_event())
        # Its memory belongs to the stream that copied; not to be given away before the other is done.
        uploaded.record_stream(compute)
        return uploaded

    @torch.inference_mode()
    def _start(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute on the device; on a GPU this returns before it is done."""
        if self.int8:
            output = self.net(images.permute(0, 3, 1, 2))
        elif self.fused:
            output = self.net(normalize(images, self.dtype))
        else:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                output = self.net(normalize(images))
        # The difference of two logits through a sigmoid is the softmax of two classes.
        margin = output.logits[:, 1].float() - output.logits[:, 0].float()
        probability = torch.sigmoid(margin / self.card.temperature)
        kinds = output.kind_logits
        return probability, None if kinds is None else torch.softmax(kinds.float(), dim=1)

    def probability(self, pixels: np.ndarray) -> np.ndarray:
        """Probability that each pixel is blurred, float32 H×W, for one photo uint8 H×W×3."""
        return self.predict(np.require(pixels, requirements=["C", "W"])[None])[0][0]

    def detect(self, photo: str | os.PathLike[str] | bytes, working_size: int | None = None) -> Detection:
        """Detect blur in one photo, a path or its bytes, upright and at working size.

        Raises:
            ValueError: the bytes are no photo that can be decoded; the message says why.
        """
        data = photo if isinstance(photo, bytes) else Path(photo).read_bytes()
        decoded = decode(data, self.card.working_size if working_size is None else working_size)
        if decoded.pixels is None:
            name = "the photo" if isinstance(photo, bytes) else os.fspath(photo)
            raise ValueError(f"{name} is {decoded.status}: {decoded.error}")
        probability, kinds = self.predict(decoded.pixels[None])
        kind = None if kinds is None else kinds[0]
        return measure(probability[0], kind, decoded.capture.subject_area)


def _fetched(results: tuple[Tensor, Tensor | None]) -> tuple[np.ndarray, np.ndarray | None]:
    probability, kinds = results
    return probability.cpu().numpy(), None if kinds is None else kinds.cpu().numpy()


def cpu_batch(card: Card) -> int:
    """How many photos at the card's working size a CPU is given at once."""
    return max(1, round(CPU_BATCH * (WORKING_SIZE / card.working_size) ** 2))


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bf16 arithmetic is in hardware: emulated, it is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def load(name_or_uri: str = DEFAULT_MODEL, device: torch.device | str | None = None) -> Model:
    """Load a shipped model by name, or any model by folder or fsspec URI.

    Args:
        name_or_uri: for example ``bdnet-topdown`` or ``s3://bucket/models/mine``.
        device: CUDA where there is one, else the CPU.

    Raises:
        ValueError: there is no model, or weights, card and this bdnet don't belong together.
        OSError: storage refuses.
    """
    net, card = read_network(name_or_uri)
    return Model(net, card, device)


def read_network(name_or_uri: str, read: Callable[[str], bytes] = read_file) -> tuple[nn.Module, Card]:
    """Read a model's network as it was trained, in fp32 on the CPU; errors as ``load``.

    Args:
        name_or_uri: as of ``load``.
        read: reads a file that isn't shipped.
    """
    weights, card = read_folder(name_or_uri, read)
    net = build(card.arch)
    try:
        state = {name: tensor.float() for name, tensor in safetensors.torch.load(weights).items()}
        net.load_state_dict({**_counters(net), **state})
    except (SafetensorError, KeyError, RuntimeError) as error:  # KeyError: a type that torch hasn't
        raise ValueError(
            f"{name_or_uri}: {WEIGHTS_FILE} doesn't hold the weights of {card.arch}, which its card names; "
            "copy both again"
        ) from error
    return net, card


def write_file(uri: str, data: bytes) -> None:
    """Write a file in a local folder, made where there is none, or at an fsspec URI."""
    fs, path = fsspec.core.url_to_fs(uri)
    if isinstance(fs, LocalFileSystem):  # object stores have no folders, and asking may want more rights
        fs.makedirs(fs._parent(path), exist_ok=True)
    fs.pipe_file(path, data)


def save(
    net: nn.Module, folder: str, card: dict[str, Any], write: Callable[[str, bytes], None] = write_file
) -> Card:
    """Write a network as half-precision weights with its card.

    Args:
        net: the network.
        folder: a local folder or an fsspec URI.
        card: the card's fields beside the digest.
        write: writes a file.

    Raises:
        ValueError: a weight is not finite or does not fit half precision.
        OSError: storage refuses.
    """
    state = {}
    for name, tensor in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        # Half precision halves the file. Statistics stay: a variance may be below what half can hold.
        half = tensor.to(torch.float16) if "running_" not in name else tensor
        if not torch.isfinite(half).all():
            raise ValueError(f"weight {name} is not finite in half precision; the training diverged")
        state[name] = half.detach().cpu().contiguous()
    weights = safetensors.torch.save(state)
    complete = Card(digest=hashlib.sha256(weights).hexdigest(), **card)
    # The card last: a folder with a card is a whole model.
    write(f"{folder.rstrip('/')}/{WEIGHTS_FILE}", weights)
    write(f"{folder.rstrip('/')}/{CARD_FILE}", json.dumps(asdict(complete), indent=2).encode() + b"\n")
    return complete


def _counters(net: nn.Module) -> dict[str, Tensor]:
    """Batch counters of the normalisations, which files leave out: evaluation doesn't read them."""
    return {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
