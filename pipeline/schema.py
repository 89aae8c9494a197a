"""The columns of audits and of patch datasets, in one place.

The audit table has exactly one row per (uri, etag, audit_digest). Measurements are null unless
status is ``ok``: a broken photo is never scored as blurry.
"""

from typing import Literal, get_args

import pyarrow as pa

SCHEMA_VERSION = "1"

FinalStatus = Literal["ok", "truncated", "unreadable", "unsupported", "too_large", "empty"]
RetryableStatus = Literal["denied", "throttled", "timeout", "changed", "missing", "archived"]

FINAL_STATUSES: tuple[str, ...] = get_args(FinalStatus)
RETRYABLE_STATUSES: tuple[str, ...] = get_args(RetryableStatus)

UTC_TIME = pa.timestamp("us", tz="UTC")
LOCAL_TIME = pa.timestamp("us")

# One photo version: what a listing knows before any byte is read.
LISTING = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("modified_at", UTC_TIME),
    ]
)

# What a camera wrote; null where absent.
CAPTURE = pa.schema(
    [
        pa.field("captured_at", LOCAL_TIME),
        pa.field("camera", pa.string()),
        pa.field("camera_serial", pa.string()),
        pa.field("lens", pa.string()),
        pa.field("lens_serial", pa.string()),
        pa.field("iso", pa.int32()),
        pa.field("exposure_s", pa.float64()),
        pa.field("f_number", pa.float64()),
        pa.field("focal_mm", pa.float64()),
    ]
)

# Null unless status is ok.
MEASUREMENTS = pa.schema(
    [
        pa.field("blurred_fraction", pa.float64()),
        pa.field("largest_sharp_fraction", pa.float64()),
        pa.field("subject_blurred_fraction", pa.float64()),
        pa.field("subject_source", pa.string()),
        pa.field("uncertainty", pa.float64()),
        pa.field("blur_kind", pa.string()),
        pa.field("kind_confidence", pa.float64()),
        pa.field("verdict", pa.string()),
        pa.field("focus", pa.string()),
        pa.field("mask", pa.binary()),
        pa.field("mask_width", pa.int32()),
        pa.field("mask_height", pa.int32()),
        pa.field("mask_shard", pa.string()),
    ]
)

PROVENANCE = pa.schema(
    [
        pa.field("model_digest", pa.string(), nullable=False),
        pa.field("audit_digest", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("audited_at", UTC_TIME, nullable=False),
    ]
)

# What is known of a photo version once it was read, whether it could be decoded or not.
DECODED = pa.schema(
    [
        *LISTING,
        pa.field("format", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        *CAPTURE,
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)

AUDIT_TABLE = pa.schema([*DECODED, *MEASUREMENTS, *PROVENANCE])

# Retryable failures, append-only, by run; these photos are tried again by the next run.
FAILURES_TABLE = pa.schema(
    [
        *LISTING,
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("failed_at", UTC_TIME, nullable=False),
    ]
)

# One training patch: lossless bytes and the photo they came from.
PATCHES = pa.schema(
    [
        pa.field("photo", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("cut", pa.string(), nullable=False),
        # The window in the photo's pixels; the whole photo for a resized or an uncut one.
        pa.field("left", pa.int32(), nullable=False),
        pa.field("top", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("blurred_fraction", pa.float64(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("mask", pa.binary(), nullable=False),
    ]
)
