"""The steps of an audit that run on the cluster: read and decode, detect, stage. Rows in, rows out."""

import io
import json
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from bdnet.detect import Detection, measure
from bdnet.memory import MemoryBudget
from bdnet.photo import Limits, Photo, decode, decoder_version
from pipeline import decoding, models, storage
from pipeline.fetch import fetch
from pipeline.layout import AuditLayout, new_part
from pipeline.ledger import stage
from pipeline.schema import AUDIT_TABLE, DECODED, FAILURES_TABLE, MEASUREMENTS, RETRYABLE_STATUSES

if TYPE_CHECKING:
    pass

FETCH_THREADS = 8
LIMITS = Limits()
# Files that the threads of a process hold together, by the size that was listed.
_FETCHED = MemoryBudget(LIMITS.max_bytes)
# Careful decoding of a block ends long before ``stream.STALL_ENDS_SECONDS``, or its rows would never come.
CAREFUL_SECONDS = 1200.0
# Beginnings of a task, after which its photos are left for the next run: Ray itself would go on for ever.
ATTEMPTS = 4

_BEFORE_DETECTION = pa.schema(
    [
        *DECODED,
        # Seconds: of a thread that waits for storage, and of a core.
        pa.field("fetch_s", pa.float32()),
        pa.field("decode_s", pa.float32()),
    ]
)
_WITH_PIXELS = pa.schema(
    [
        *_BEFORE_DETECTION,
        # Upright RGB rows at working size, and where the camera saw its subject.
        pa.field("pixels", pa.large_binary()),
        pa.field("pixels_height", pa.int32()),
        pa.field("pixels_width", pa.int32()),
        pa.field("subject_area", pa.list_(pa.float64())),
    ]
)
_DETECTED = pa.schema(
    [
        *_BEFORE_DETECTION,
        *MEASUREMENTS,
        # Seconds of a detector: in the network, measuring and packing masks, waiting for photos.
        pa.field("detect_s", pa.float32()),
        pa.field("encode_s", pa.float32()),
        pa.field("idle_s", pa.float32()),
    ]
)
TIMED = ("fetch_s", "decode_s", "detect_s", "encode_s", "idle_s")


@dataclass(frozen=True)
class Provenance:
    """Which run and model wrote a row."""

    model_digest: str
    audit_digest: str
    run_id: str


def read_and_decode(photos: pa.Table, working_size: int, decoder: str) -> pa.Table:
    """Fetch and decode photo versions (``schema.LISTING``); each becomes one row, whatever it holds.

    Bytes are decoded in the thread that fetched them. However large photos are, this process holds at most
    ``LIMITS.max_bytes`` of files and takes ``LIMITS.max_memory`` to decode, beside a block of photos at
    working size: a photo that doesn't fit in waits for the others.

    After its worker died the task runs again, carefully: one photo after the other, in processes of their
    own, so that the one that kills its decoder is known, as many as CAREFUL_SECONDS allow. If that doesn't
    help it is no photo's fault. What isn't decoded then is left for the next run.

    Raises:
        ValueError: this process decodes otherwise than ``decoder``, the version under which rows are kept.
    """
    if decoder_version() != decoder:
        raise ValueError(
            f"a node has decoder {decoder_version()}, the driver {decoder}: install the same packages on all"
        )
    rows = photos.to_pylist()
    attempts = decoding.attempt()
    if attempts >= ATTEMPTS:
        reason = f"the workers that read it were killed {attempts} times"
        decoded = [{**row, "status": "timeout", "error": reason} for row in rows]
    elif attempts:
        with decoding.Isolated() as isolated:
            decoded = list(_read_and_decode_carefully(rows, working_size, isolated.decode))
    else:
        watchdog = decoding.Watchdog()

        def watched(data: bytes, size: int, limits: Limits) -> Photo:
            with watchdog.watching():
                return decode(data, size, limits)

        with ThreadPoolExecutor(FETCH_THREADS) as pool:
            decoded = list(pool.map(lambda row: _read_and_decode_one(row, working_size, watched), rows))
    return pa.Table.from_pylist(decoded, schema=_WITH_PIXELS)


def _read_and_decode_carefully(
    rows: list[dict[str, Any]], working_size: int, decode: Callable[[bytes, int, Limits], Photo]
) -> Iterator[dict[str, Any]]:
    ends = time.monotonic() + CAREFUL_SECONDS
    for row in rows:
        if time.monotonic() < ends:
            yield _read_and_decode_one(row, working_size, decode)
        else:
            reason = "others of its block took all the time there is: decoding them hangs, or storage does"
            yield {**row, "status": "timeout", "error": reason}


def _read_and_decode_one(
    row: dict[str, Any], working_size: int, decode: Callable[[bytes, int, Limits], Photo]
) -> dict[str, Any]:
    if row["size_bytes"] > LIMITS.max_bytes:
        return {**row, "status": "too_large", "error": f"{row['size_bytes']:,} bytes; it was not read"}
    # Some web servers tell no size: then it may be any that is read at all.
    tells_size = storage.is_local(row["uri"]) or row["uri"].startswith("s3://")
    most = row["size_bytes"] if tells_size else row["size_bytes"] or LIMITS.max_bytes
    with _FETCHED.reserve(most):
        began = time.perf_counter()
        fetched = fetch(row["uri"], row["etag"], most)
        row = {**row, "fetch_s": time.perf_counter() - began}
        if fetched.data is None:
            return {**row, "status": fetched.status, "error": fetched.error}
        # Many threads share a core here; each one's own part of it is what decoding takes.
        began = time.thread_time()
        photo = decode(fetched.data, working_size, LIMITS)
        row["decode_s"] = time.thread_time() - began
    decoded = {**row, **asdict(photo.capture), "status": photo.status, "error": photo.error}
    decoded |= {"format": photo.format, "width": photo.width, "height": photo.height}
    if photo.pixels is not None:
        height, width, _ = photo.pixels.shape
        # A copy: pyarrow 26 never lets go of a memoryview that it made a column of.
        decoded |= {"pixels": photo.pixels.tobytes(), "pixels_height": height, "pixels_width": width}
    return decoded


class Detector:
    """Holds the network once per process and measures decoded photos."""

    def __init__(self, model: str, digest: str, threads: int) -> None:
        self._model = models.load(model, digest, threads)
        self._free_since = time.perf_counter()

    def __call__(self, photos: pa.Table) -> pa.Table:
        """Measure the photos whose status is ok; pixels leave the rows, measurements and mask join them."""
        rows = photos.to_pylist()
        if rows:
            rows[0]["idle_s"] = time.perf_counter() - self._free_since
        shapes: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for row in rows:
            if row["pixels"] is not None:
                shapes.setdefault((row["pixels_height"], row["pixels_width"]), []).append(row)
        batches = []
        for shape, alike in shapes.items():
            size = self._photos_at_once(*shape)
            batches += [alike[i : i + size] for i in range(0, len(alike), size)]
        results = self._model.predict_all(map(_images, batches))
        for batch in batches:
            began = time.perf_counter()
            probabilities, kinds = next(results)
            detected = time.perf_counter()
            for index, row in enumerate(batch):
                area = row["subject_area"]
                kind = None if kinds is None else kinds[index]
                detection = measure(probabilities[index], kind, tuple(area) if area else None)
                row |= measurements(detection)
            batch[0]["detect_s"] = detected - began
            batch[0]["encode_s"] = time.perf_counter() - detected
        self._free_since = time.perf_counter()
        return pa.Table.from_pylist(rows, schema=_DETECTED)

    def _photos_at_once(self, height: int, width: int) -> int:
        """The model's batch; fewer where photos are larger than those that it is made for."""
        batch, made_for = self._model.batch, self._model.card.working_size
        return min(batch, max(1, batch * made_for**2 // max(height, width) ** 2))


def _images(photos: Sequence[dict[str, Any]]) -> np.ndarray:
    """The pixels of photos of equal shape, uint8 N×H×W×3."""
    height, width = photos[0]["pixels_height"], photos[0]["pixels_width"]
    pixels = np.stack([np.frombuffer(row["pixels"], np.uint8) for row in photos])
    return pixels.reshape(len(photos), height, width, 3)


def measurements(detection: Detection) -> dict[str, Any]:
    """A detection as columns of ``schema.MEASUREMENTS``."""
    values = {f.name: getattr(detection, f.name) for f in fields(detection) if f.name in MEASUREMENTS.names}
    height, width = detection.mask.shape
    return {**values, "mask": encode_mask(detection.mask), "mask_width": width, "mask_height": height}


def encode_mask(mask: np.ndarray) -> bytes:
    """A mask, bool H×W, as 1-bit PNG, white = blurred."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


def stage_rows(photos: pa.Table, out: str, provenance: Provenance, mask_shards: bool) -> pa.Table:
    """Write detected photos beside the tables; return one row per file written, for the driver to commit."""
    began = time.perf_counter()
    layout = AuditLayout(out)
    now = datetime.now(UTC)
    seconds = {name.removesuffix("_s"): pc.sum(photos[name]).as_py() or 0.0 for name in TIMED}
    rows = photos.to_pylist()
    failed = [row for row in rows if row["status"] in RETRYABLE_STATUSES]
    final = [row for row in rows if row["status"] not in RETRYABLE_STATUSES]
    written = []
    if final:
        if mask_shards:
            _write_mask_shard(final, layout, provenance.run_id)
        extra = {**asdict(provenance), "audited_at": now}
        table = pa.Table.from_pylist([{**row, **extra} for row in final], schema=AUDIT_TABLE)
        written.append(("table", stage(table, layout.table, provenance.run_id), final))
    if failed:
        extra = {"run_id": provenance.run_id, "failed_at": now}
        table = pa.Table.from_pylist([{**row, **extra} for row in failed], schema=FAILURES_TABLE)
        written.append(("failures", stage(table, layout.failures, provenance.run_id), failed))
    seconds["stage"] = time.perf_counter() - began
    return pa.Table.from_pylist(
        [
            {
                "target": target,
                **asdict(staged),
                "by_status": json.dumps(Counter(row["status"] for row in its_rows)),
                "by_verdict": json.dumps(Counter(row["verdict"] for row in its_rows if row["verdict"])),
                "seconds": json.dumps(seconds if number == 0 else {}),
            }
            for number, (target, staged, its_rows) in enumerate(written)
        ]
    )


def _write_mask_shard(rows: list[dict[str, Any]], layout: AuditLayout, run_id: str) -> None:
    """Put the rows' masks into one tar file; ``mask_shard`` becomes TAR/MEMBER, TAR lying under OUT/masks."""
    masked = [row for row in rows if row["mask"] is not None]
    if not masked:
        return
    name = new_part(run_id, ".tar")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for index, row in enumerate(masked):
            # A number leads, so that equal names differ; what is left of the photo's own name is for people.
            stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in PurePosixPath(row["uri"]).stem)
            member = tarfile.TarInfo(f"{index:05d}-{stem[:60]}.png")
            member.size = len(row["mask"])
            tar.addfile(member, io.BytesIO(row["mask"]))
            row["mask_shard"] = f"{name}/{member.name}"
    storage.write_bytes(storage.join(layout.masks, name), buffer.getvalue())
