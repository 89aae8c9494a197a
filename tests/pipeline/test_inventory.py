"""S3 Inventories, as Parquet and as CSV, generated as AWS documents them."""

import csv
import gzip
import io
import json
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.listing import read_listing, write_listing

WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
# As in Parquet; CSV has LastModifiedDate for last_modified_date, and so on.
OBJECTS = [
    {
        "key": "a b+ü.jpg",
        "is_latest": True,
        "is_delete_marker": False,
        "e_tag": "e1",
        "storage_class": "STANDARD",
    },
    {
        "key": "old.jpg",
        "is_latest": False,
        "is_delete_marker": False,
        "e_tag": "e2",
        "storage_class": "STANDARD",
    },
    {"key": "gone.jpg", "is_latest": True, "is_delete_marker": True, "e_tag": "", "storage_class": ""},
    {
        "key": "cold.jpg",
        "is_latest": True,
        "is_delete_marker": False,
        "e_tag": "e3-2",
        "storage_class": "GLACIER",
    },
    {
        "key": "folder.jpg/",
        "is_latest": True,
        "is_delete_marker": False,
        "e_tag": "e4",
        "storage_class": "STANDARD",
    },
    {
        "key": "notes.txt",
        "is_latest": True,
        "is_delete_marker": False,
        "e_tag": "e5",
        "storage_class": "STANDARD",
    },
]
COLUMNS = ("bucket", *OBJECTS[0], "size", "last_modified_date")


def rows():
    return [
        {
            "bucket": "photos",
            **found,
            "size": None if found["is_delete_marker"] else 7,
            "last_modified_date": WHEN,
        }
        for found in OBJECTS
    ]


def as_parquet(found, columns):
    types = {"is_latest": pa.bool_(), "is_delete_marker": pa.bool_(), "size": pa.int64()}
    types["last_modified_date"] = pa.timestamp("ms", tz="UTC")
    schema = pa.schema([(name, types.get(name, pa.string())) for name in columns])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(found, schema=schema), buffer)
    return buffer.getvalue()


def as_csv(found, columns):
    text = io.StringIO()
    for row in found:
        said = row | {"key": {"a b+ü.jpg": "a+b%2B%C3%BC.jpg"}.get(row["key"], row["key"])}
        said |= {"is_latest": str(row["is_latest"]).lower(), "last_modified_date": "2026-01-02T03:04:05.000Z"}
        said |= {"is_delete_marker": str(row["is_delete_marker"]).lower()}
        csv.writer(text, quoting=csv.QUOTE_ALL).writerow(
            ["" if said[c] is None else said[c] for c in columns]
        )
    return gzip.compress(text.getvalue().encode())


def put_inventory(name, kind, columns=COLUMNS):
    """Write an inventory of two files, with one object in both; return the URI of its manifest."""
    found, files = rows(), []
    for number, part in enumerate((found[:3], [*found[3:], found[0]])):
        key = f"inventory/{name}/data/{number}.{kind.lower()}"
        data = as_parquet(part, columns) if kind == "Parquet" else as_csv(part, columns)
        storage.write_bytes(f"s3://out/{key}", data)
        files.append({"key": key, "size": len(data), "MD5checksum": "0" * 32})
    said = {"last_modified_date": "LastModifiedDate", "e_tag": "ETag", "is_delete_marker": "IsDeleteMarker"}
    fields = [said.get(c, c.replace("_", " ").title().replace(" ", "")) for c in columns]
    parquet = "message s3.inventory { required binary bucket (STRING); required binary key (STRING); }"
    manifest = {
        "sourceBucket": "photos",
        "destinationBucket": "arn:aws:s3:::out",
        "version": "2016-11-30",
        "creationTimestamp": "1767322800000",
        "fileFormat": kind,
        "fileSchema": ", ".join(fields) if kind == "CSV" else parquet,
        "files": files,
    }
    uri = f"s3://out/inventory/{name}/2026-01-02T01-00Z/manifest.json"
    storage.write_bytes(uri, json.dumps(manifest).encode())
    return uri


@pytest.mark.parametrize("kind", ["Parquet", "CSV"])
def test_an_inventory_is_a_source_of_its_latest_versions(s3, tmp_path, kind):
    found = write_listing(put_inventory(tmp_path.name, kind), str(tmp_path))
    photo = {"size_bytes": 7, "modified_at": WHEN}
    assert [row for shard in found.shards for row in read_listing(shard).to_pylist()] == [
        {"uri": "s3://photos/a b+ü.jpg", "etag": "e1", **photo},
        {"uri": "s3://photos/cold.jpg", "etag": "e3-2", **photo},  # to be fetched and said to be archived
    ]
    assert found.skipped_by_suffix == {".txt": 1}


@pytest.mark.parametrize("kind", ["Parquet", "CSV"])
def test_an_inventory_of_the_current_version_alone_has_no_versions(s3, tmp_path, kind):
    unversioned = tuple(column for column in COLUMNS if not column.startswith("is_"))
    found = [row for row in rows() if not row["is_delete_marker"]]
    data = as_parquet(found, unversioned) if kind == "Parquet" else as_csv(found, unversioned)
    manifest = put_inventory(tmp_path.name, kind, unversioned)
    storage.write_bytes(f"s3://out/inventory/{tmp_path.name}/data/0.{kind.lower()}", data)
    storage.write_bytes(
        f"s3://out/inventory/{tmp_path.name}/data/1.{kind.lower()}",
        as_parquet([], unversioned) if kind == "Parquet" else as_csv([], unversioned),
    )
    assert write_listing(manifest, str(tmp_path)).photos == 3


@pytest.mark.parametrize("kind", ["Parquet", "CSV"])
def test_an_inventory_without_etags_is_refused_with_the_remedy(s3, tmp_path, kind):
    manifest = put_inventory(tmp_path.name, kind, tuple(c for c in COLUMNS if c != "e_tag"))
    with pytest.raises(ValueError, match="no etag; add it to the optional fields of the inventory"):
        write_listing(manifest, str(tmp_path))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"photos,a.jpg", "Not a gzipped file"),
        (gzip.compress(b"photos,a.jpg")[:-9], "end-of-stream"),
        (gzip.compress(b"photos,a.jpg\n"), "shorter"),
        (gzip.compress(b'photos,"' + b"x" * 200_000 + b'"'), "field limit"),
        (gzip.compress(b"photos,a.jpg,true,false,e,STANDARD,much,\n"), "'much'"),
        (gzip.compress(b"photos,a.jpg,true,false,e,STANDARD,-7,\n"), "'a.jpg' has a size of -7"),
        (gzip.compress(b"photos,a.jpg,true,false,e,STANDARD,7,yesterday\n"), "'yesterday'"),
    ],
    ids=["plain", "cut", "short row", "long field", "no size", "below 0", "no moment"],
)
def test_a_damaged_file_of_an_inventory_is_named_with_its_fault(s3, tmp_path, data, said):
    manifest = put_inventory(tmp_path.name, "CSV")
    storage.write_bytes(f"s3://out/inventory/{tmp_path.name}/data/1.csv", data)
    with pytest.raises(ValueError, match=rf"data/1\.csv is not as .*{said}.*give another day's"):
        write_listing(manifest, str(tmp_path))


def test_an_inventory_without_keys_is_refused(s3, tmp_path):
    manifest = put_inventory(tmp_path.name, "CSV", tuple(c for c in COLUMNS if c != "key"))
    with pytest.raises(ValueError, match=r"data/0\.csv is not as .*'key'"):
        write_listing(manifest, str(tmp_path))


def test_a_null_in_an_inventory_is_named_with_its_file(s3, tmp_path):
    manifest = put_inventory(tmp_path.name, "Parquet")
    data = as_parquet([{**rows()[0], "e_tag": None}], COLUMNS)
    storage.write_bytes(f"s3://out/inventory/{tmp_path.name}/data/1.parquet", data)
    with pytest.raises(ValueError, match=r"data/1\.parquet is not as .*give another day's"):
        write_listing(manifest, str(tmp_path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"name": "an app"}, "is not the manifest of an S3 Inventory"),
        ([], "is not the manifest of an S3 Inventory"),
        (
            {"destinationBucket": "arn:aws:s3:::out", "fileFormat": "ORC", "fileSchema": "", "files": []},
            "in ORC; have it written in Parquet or CSV",
        ),
    ],
)
def test_another_manifest_is_refused(tmp_path, content, said):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        write_listing(str(path), str(tmp_path / "listing"))
