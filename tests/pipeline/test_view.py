"""What an audit knows now: listings, settings and Delta tables made here."""

import json
import random
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from pipeline import delta
from pipeline.delta import query, read_table
from pipeline.layout import AuditLayout
from pipeline.schema import AUDIT_TABLE, FAILURES_TABLE, LISTING
from pipeline.view import NOT_AUDITED, PHOTOS, current_runs, current_view, lost, previous_listing

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def write_shards(folder, uris, rows_per_shard=4, etag="e"):
    """Listing shards of these URIs in this order; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for start in range(0, max(len(uris), 1), rows_per_shard):
        chosen = uris[start : start + rows_per_shard]
        rows = [{"uri": uri, "etag": etag, "size_bytes": 1, "modified_at": None} for uri in chosen]
        shards.append(str(folder / f"part-{len(shards):05d}.parquet"))
        pq.write_table(pa.Table.from_pylist(rows, LISTING), shards[-1])
    return shards


@pytest.fixture
def layout(tmp_path):
    return AuditLayout(str(tmp_path / "audit"))


def write_run(
    layout, run_id, started, source="s3://b/archive", complete=True, uris=(), digest="a1", etag="e"
):
    """A run as an audit leaves it; the paths of its listing's shards."""
    shards = write_shards(Path(layout.run(run_id).listing), list(uris), etag=etag)
    settings = {
        "run_id": run_id,
        "started_at": started,
        "source": source,
        "audit_digest": digest,
        "model_digest": "m1",
        "model": "bdnet-resnet18",
        "working_size": 640,
        "listing_complete": complete,
        "skipped_by_suffix": {},
    }
    Path(layout.run(run_id).settings).write_text(json.dumps(settings))
    return shards


@pytest.mark.parametrize("shuffled", [False, True], ids=["in key order", "in random order"])
def test_what_the_new_listing_lacks_is_lost_and_what_is_new_is_not(tmp_path, shuffled):
    before = [f"s3://b/{n:03}.jpg" for n in range(40)]
    now = [uri for n, uri in enumerate(before) if n % 10 != 3] + [
        "s3://b/new.jpg",
        "s3://b/0.jpg",
        "s3://b/写真",
    ]
    arrange = random.Random(1).sample if shuffled else lambda uris, _: sorted(uris)
    old = write_shards(tmp_path / "before", arrange(before, len(before)))
    new = write_shards(tmp_path / "now", arrange(now, len(now)), rows_per_shard=7)
    assert lost(old, new)[0] == 4
    assert lost(old, old)[0] == 0


def test_all_is_lost_to_an_empty_listing_and_nothing_from_one(tmp_path):
    some = write_shards(tmp_path / "some", ["a", "b"])
    empty = write_shards(tmp_path / "empty", [])
    assert lost(some, empty) == lost(some, []) == (2, 2)
    assert lost(empty, some) == lost([], some) == (0, 0)


def test_a_changed_photo_and_one_listed_twice_are_not_lost(tmp_path):
    before = write_shards(tmp_path / "before", ["a", "a", "b"])
    assert lost(before, write_shards(tmp_path / "now", ["a", "b"]))[0] == 0
    assert lost(before, write_shards(tmp_path / "less", ["b"]))[0] == 1


def test_names_too_long_for_the_statistics_are_compared_all_the_same(tmp_path):
    long = "x" * 5000
    before = write_shards(tmp_path / "before", ["a", long, "z"])
    assert lost(before, write_shards(tmp_path / "now", [long, "z"]))[0] == 1


def test_the_listing_before_is_the_latest_complete_one_of_exactly_this_source(layout):
    assert previous_listing(layout, "s3://b/archive") == []
    write_run(layout, "r1", "2026-03-01T06:00:00+00:00", uris=["s3://b/archive/a"])
    expected = write_run(
        layout, "r2", "2026-03-02T06:00:00+00:00", uris=[f"s3://b/archive/{n}" for n in range(9)]
    )
    write_run(layout, "r3", "2026-03-03T06:00:00+00:00", complete=False)
    write_run(layout, "r4", "2026-03-04T06:00:00+00:00", source="s3://b/archive/2024")
    write_run(layout, "r5", "2026-03-05T06:00:00+00:00", source="s3://b/archives")
    write_shards(
        Path(layout.run("failed").listing), ["s3://b/archive/a"]
    )  # its listing broke off: no settings
    assert len(expected) == 3
    assert previous_listing(layout, "s3://b/archive") == expected


PREFIX = "s3://b/archive"
FIRST, SECOND, THIRD = (f"2026-03-0{day}T06:00:00+00:00" for day in (1, 2, 3))


def commit(layout, *photos, digest="a1", etag="e"):
    """Audit rows of these URIs."""
    rows = [
        {"uri": uri, "etag": etag, "size_bytes": 1, "status": "ok", "blurred_fraction": 0.5}
        | {"verdict": "partly_blurred", "focus": "shallow_depth", "run_id": "r", "audited_at": NOW}
        | {"model_digest": "m1", "audit_digest": digest}
        for uri in photos
    ]
    rows = [{name: row.get(name) for name in AUDIT_TABLE.names} for row in rows]
    write_deltalake(layout.table, pa.Table.from_pylist(rows, AUDIT_TABLE), mode="append")


def fail(layout, *failures):
    """Retryable failures: (uri, status, hour)."""
    rows = [
        {"uri": uri, "etag": "e", "size_bytes": 1, "status": status, "error": f"at {hour}", "run_id": "r"}
        | {"modified_at": None, "failed_at": NOW.replace(hour=hour)}
        for uri, status, hour in failures
    ]
    write_deltalake(layout.failures, pa.Table.from_pylist(rows, FAILURES_TABLE), mode="append")


def photos(layout):
    """The view's photos, by name."""
    tables = list(current_view(layout).tables())
    assert all(table.schema == PHOTOS for table in tables)
    rows = [row for table in tables for row in table.to_pylist()]
    return sorted(rows, key=lambda row: (row["uri"], row["etag"]))


def names(layout):
    return [row["uri"].removeprefix(f"{PREFIX}/") for row in photos(layout)]


def test_a_photo_gone_from_the_latest_complete_listing_leaves_the_view_and_keeps_its_history(layout):
    commit(layout, f"{PREFIX}/kept", f"{PREFIX}/gone")
    write_run(layout, "r1", FIRST, uris=[f"{PREFIX}/kept", f"{PREFIX}/gone"])
    assert names(layout) == ["gone", "kept"]
    write_run(layout, "r2", SECOND, uris=[f"{PREFIX}/kept"])
    assert names(layout) == ["kept"]
    history = query(read_table(layout.table), "SELECT uri FROM delta", pa.schema([("uri", pa.string())]))
    assert sorted(history["uri"].to_pylist()) == [f"{PREFIX}/gone", f"{PREFIX}/kept"]


def test_a_limited_listing_never_marks_anything_gone(layout):
    write_run(layout, "r1", FIRST, uris=[f"{PREFIX}/a", f"{PREFIX}/b"])
    write_run(layout, "r2", SECOND, uris=[f"{PREFIX}/a"], complete=False)
    assert names(layout) == ["a", "b"]
    assert current_view(layout).run.run_id == "r1"


def test_a_failed_listing_never_marks_anything_gone(layout):
    write_run(layout, "r1", FIRST, uris=[f"{PREFIX}/a", f"{PREFIX}/b"])
    # What a listing that broke off leaves: shards, and no settings.
    write_shards(Path(layout.run("r2").listing), [f"{PREFIX}/a"])
    Path(layout.runs, "stray file").touch()
    assert names(layout) == ["a", "b"]


def test_only_where_no_listing_is_complete_the_latest_limited_one_counts(layout):
    write_run(layout, "r1", FIRST, uris=[f"{PREFIX}/a", f"{PREFIX}/b"], complete=False)
    write_run(layout, "r2", SECOND, uris=["s3://b/other/c"], source="s3://b/other", complete=False)
    view = current_view(layout)
    assert [run.run_id for run in view.runs] == ["r2"]
    assert not view.run.listing_complete


def test_a_newer_listing_of_a_narrower_prefix_refreshes_its_part_and_hides_no_other(layout):
    listed = [f"{PREFIX}/{name}" for name in ("2023/a", "2024/b", "2024/gone", "2024.jpg", "2024b/c")]
    write_run(layout, "r1", FIRST, uris=listed)
    write_run(layout, "r2", SECOND, uris=[f"{PREFIX}/2024/b", f"{PREFIX}/2024/new"], source=f"{PREFIX}/2024")
    assert names(layout) == ["2023/a", "2024.jpg", "2024/b", "2024/new", "2024b/c"]
    assert [run.run_id for run in current_view(layout).outermost] == ["r1"]


def test_a_newer_listing_of_the_whole_replaces_that_of_a_narrower_prefix(layout):
    write_run(layout, "r1", FIRST, uris=[f"{PREFIX}/2024/gone"], source=f"{PREFIX}/2024")
    write_run(layout, "r2", SECOND, uris=[f"{PREFIX}/2023/a"])
    assert names(layout) == ["2023/a"]
    assert [run.run_id for run in current_view(layout).runs] == ["r2"]
    # Housekeeping still keeps what the next listing of the narrower prefix is compared with.
    assert [run.run_id for run in current_runs(layout)] == ["r2", "r1"]


def test_sources_beside_each_other_are_all_in_the_view(layout):
    write_run(layout, "r1", FIRST, uris=[f"{PREFIX}/a"])
    write_run(layout, "r2", SECOND, uris=["s3://b/archives/b"], source="s3://b/archives")
    assert [row["uri"] for row in photos(layout)] == [f"{PREFIX}/a", "s3://b/archives/b"]
    view = current_view(layout)
    assert view.name(f"{PREFIX}/a") == f"{PREFIX}/a"  # shortened, it could be of either


def test_names_are_shortened_below_the_only_outermost_source(layout):
    write_run(layout, "r1", FIRST, uris=[f"{PREFIX}/2024/a"])
    write_run(layout, "r2", SECOND, uris=[f"{PREFIX}/2024/a"], source=f"{PREFIX}/2024")
    assert current_view(layout).name(f"{PREFIX}/2024/a") == "2024/a"


def test_a_manifest_refreshes_the_photos_that_it_names_until_a_newer_listing_covers_them(layout):
    manifest = "s3://b/archive/wanted.parquet"  # where it lies says nothing of what it lists
    write_run(layout, "r1", FIRST, uris=[f"{PREFIX}/{name}" for name in "abcdefgh"])
    write_run(layout, "r2", SECOND, uris=["s3://c/else", f"{PREFIX}/b"], source=manifest, etag="e2")
    found = [(row["uri"], row["etag"]) for row in photos(layout)]
    others = [(f"{PREFIX}/{name}", "e") for name in "acdefgh"]
    assert found == sorted([*others, (f"{PREFIX}/b", "e2"), ("s3://c/else", "e2")])
    write_run(layout, "r3", THIRD, uris=[f"{PREFIX}/a", f"{PREFIX}/b"])
    found = [(row["uri"], row["etag"]) for row in photos(layout)]
    assert found == [(f"{PREFIX}/a", "e"), (f"{PREFIX}/b", "e"), ("s3://c/else", "e2")]


def test_the_dated_manifests_of_one_inventory_are_one_source(layout):
    inventory = "s3://lists/b/nightly"
    one, two = (f"{inventory}/2026-03-0{day}T01-00Z/manifest.json" for day in (1, 2))
    expected = write_run(layout, "r1", FIRST, uris=[f"{PREFIX}/a", f"{PREFIX}/gone"], source=one)
    assert previous_listing(layout, two) == expected
    assert previous_listing(layout, "s3://lists/c/nightly/2026-03-02T01-00Z/manifest.json") == []
    write_run(layout, "r2", SECOND, uris=[f"{PREFIX}/a"], source=two)
    assert names(layout) == ["a"]


def test_a_local_name_that_is_no_utf8_lies_below_its_folder_too(layout):
    outside, inside = "file:///photos/old/%ff.jpg", "file:///photos/new/%ff.jpg"
    write_run(layout, "r1", FIRST, uris=[outside, inside], source="/photos")
    write_run(layout, "r2", SECOND, uris=["/photos/new/a.jpg"], source="/photos/new")
    assert [row["uri"] for row in photos(layout)] == ["/photos/new/a.jpg", outside]


def test_each_photo_is_shown_as_the_run_that_listed_it_measures(layout):
    new, old = f"{PREFIX}/2024/a", f"{PREFIX}/2023/a"
    commit(layout, new, old, digest="a1")
    commit(layout, new, digest="a2")
    write_run(layout, "r1", FIRST, uris=[new, old], digest="a1")
    write_run(layout, "r2", SECOND, uris=[new], source=f"{PREFIX}/2024", digest="a2")
    assert [(row["uri"], row["status"], row["audit_digest"]) for row in photos(layout)] == [
        (old, "ok", "a1"),
        (new, "ok", "a2"),
    ]


def test_what_an_older_model_measured_is_not_shown_as_the_new_ones(layout):
    audited, waiting, failed = (f"{PREFIX}/{name}" for name in ("audited", "waiting", "failed"))
    commit(layout, audited, waiting, failed, digest="a1")
    commit(layout, audited, digest="a2")
    fail(layout, (failed, "timeout", 1))
    write_run(layout, "r1", FIRST, uris=[audited, waiting, failed], digest="a1")
    assert [row["status"] for row in photos(layout)] == ["ok", "ok", "ok"]
    write_run(layout, "r2", SECOND, uris=[audited, waiting, failed], digest="a2")
    found = {row["uri"]: (row["status"], row["blurred_fraction"]) for row in photos(layout)}
    assert found == {audited: ("ok", 0.5), waiting: (NOT_AUDITED, None), failed: ("timeout", None)}


def test_the_latest_of_many_failures_counts_even_across_what_is_read_at_once(layout, monkeypatch):
    monkeypatch.setattr(delta, "ROWS_AT_ONCE", 2)
    uri = f"{PREFIX}/a"
    for hour, status in [(3, "timeout"), (9, "denied"), (1, "throttled"), (5, "missing")]:
        fail(layout, (uri, status, hour), (f"{uri} other", status, hour))
    write_run(layout, "r1", FIRST, uris=[uri])
    assert [(row["status"], row["error"]) for row in photos(layout)] == [("denied", "at 9")]


@pytest.mark.parametrize("at_once", [3, 50_000])
def test_a_manifest_in_random_order_has_the_same_view_as_one_in_key_order(layout, monkeypatch, at_once):
    monkeypatch.setattr(delta, "ROWS_AT_ONCE", at_once)
    uris = [f"{PREFIX}/{n:03}" for n in range(40)]
    for start in range(0, 40, 10):
        commit(layout, *uris[start : start + 7])
    write_run(layout, "r1", FIRST, uris=uris)
    in_order = photos(layout)
    write_run(layout, "r2", SECOND, uris=random.Random(1).sample(uris, 40))
    assert photos(layout) == in_order
    assert [row["status"] for row in in_order].count("ok") == 28


def test_the_view_streams_one_listing_shard_at_a_time(layout):
    uris = [f"{PREFIX}/{n:03}" for n in range(40)]
    commit(layout, *uris)
    write_run(layout, "r1", FIRST, uris=uris)  # shards of 4
    tables = current_view(layout).tables()
    assert [table.num_rows for table in tables] == [4] * 10


def test_a_shard_that_is_all_audited_does_not_ask_for_failures(layout):
    commit(layout, f"{PREFIX}/a")
    write_run(layout, "r1", FIRST, uris=[f"{PREFIX}/a"])
    Path(layout.failures, "_delta_log").mkdir(parents=True)
    Path(layout.failures, "_delta_log", "00000000000000000000.json").write_text("broken")
    assert [row["status"] for row in photos(layout)] == ["ok"]
