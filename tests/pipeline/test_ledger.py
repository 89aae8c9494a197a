"""The ledger: what is staged, what is committed, what remains to do."""

import json
import os
from datetime import UTC, datetime

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, QueryBuilder
from deltalake.exceptions import CommitFailedError

from pipeline import ledger, storage
from pipeline.delta import open_table, storage_options
from pipeline.ledger import APP_ID, Committer, stage, subtract
from pipeline.listing import read_listing
from pipeline.schema import AUDIT_TABLE, LISTING

NOW = datetime(2026, 3, 1, 6, 0, 0, 123456, tzinfo=UTC)
TAKEN = datetime(2025, 12, 24, 18, 30, 5, 250000)  # as the camera's clock said: no zone


@pytest.fixture(params=["local", "s3"])
def table(request, tmp_path):
    """Where a table is to be, on disk and on a real S3 server."""
    if request.param == "local":
        return str(tmp_path / "table")
    request.getfixturevalue("s3")
    return f"s3://out/{tmp_path.name}/table"


@pytest.fixture
def local_table(tmp_path):
    return str(tmp_path / "table")


def photo(uri, etag="e1"):
    return {"uri": uri, "etag": etag, "size_bytes": 1, "modified_at": NOW}


def rows(*photos, digest="a1"):
    """Rows of the audit table for photos."""
    made = {"captured_at": TAKEN, "status": "ok", "blurred_fraction": 0.25, "mask": b"\x89PNG"}
    made |= {"model_digest": "m1", "audit_digest": digest, "run_id": "r1", "audited_at": NOW}
    return pa.Table.from_pylist([{**photo, **made} for photo in photos], schema=AUDIT_TABLE)


def commit(table, *photos, digest="a1", run_id="r1"):
    committer = Committer(table, AUDIT_TABLE, run_id)
    committer.add(stage(rows(*photos, digest=digest), table, run_id))
    committer.flush()


def delta(table):
    return DeltaTable(table, storage_options=storage_options(table))


def committed(table):
    """URIs in the table, sorted, each as often as it is there."""
    found = QueryBuilder().register("t", delta(table)).execute("SELECT uri FROM t ORDER BY uri")
    return pa.table(found)["uri"].to_pylist()


def listing_shard(folder, *photos):
    uri = str(folder / "listing.parquet")
    pq.write_table(pa.Table.from_pylist(list(photos), schema=LISTING), uri)
    return uri


def to_do(shard, table, digest="a1", version=None):
    left = shard + ".to_do"
    count = subtract(shard, left, table, version, digest)
    assert storage.exists(left) == (count > 0)
    found = read_listing(left) if count else LISTING.empty_table()
    assert (found.num_rows, found.schema) == (count, LISTING)
    storage.remove(left)
    return sorted((row["uri"], row["etag"]) for row in found.to_pylist())


def test_committed_rows_are_in_the_table_once_and_staged_ones_are_not(table):
    open_table(table, AUDIT_TABLE)
    committer = Committer(table, AUDIT_TABLE, "r1")
    committer.add(stage(rows(photo("a"), photo("b")), table, "r1"))
    stage(rows(photo("lost"), photo("a")), table, "r1")  # its task was retried, or the driver died
    assert committed(table) == []
    committer.flush()
    assert committed(table) == ["a", "b"]
    committer.flush()  # with nothing new
    assert committed(table) == ["a", "b"]
    assert delta(table).version() == 1


def test_a_table_of_other_columns_is_not_written_to(local_table):
    newer = pa.schema([*AUDIT_TABLE, pa.field("sharpness", pa.float64())]).remove(0)
    open_table(local_table, newer)
    with pytest.raises(ValueError, match=r"its columns differ in sharpness, uri\. Give another --out"):
        Committer(local_table, AUDIT_TABLE, "r1")
    assert delta(local_table).version() == 0


def test_files_commit_in_groups_and_the_log_names_run_and_rising_number(table):
    committer = Committer(table, AUDIT_TABLE, "r1")
    for name in "abc":
        committer.add(stage(rows(photo(name)), table, "r1"))
    committer.flush()
    assert delta(table).transaction_version(APP_ID) == 1
    assert delta(table).history(1)[0]["bdnet_commit"] == "r1 1"
    committer.add(stage(rows(photo("d")), table, "r1"))
    committer.flush()
    assert committer.version == delta(table).version() == 2  # created, three files together, one file
    # The number goes on rising in the next run.
    commit(table, photo("e"), run_id="r2")
    assert delta(table).transaction_version(APP_ID) == 3
    assert delta(table).history(1)[0]["bdnet_commit"] == "r2 3"
    assert committed(table) == ["a", "b", "c", "d", "e"]


def test_a_file_on_another_machines_disk_is_refused_and_what_the_table_had_stays(local_table):
    commit(local_table, photo("a.jpg"))
    committer = Committer(local_table, AUDIT_TABLE, "r2")
    elsewhere = stage(rows(photo("b.jpg")), local_table, "r2")
    os.remove(os.path.join(local_table, elsewhere.path))
    committer.add(elsewhere)
    with pytest.raises(OSError, match="give an --out that all nodes of the cluster see"):
        committer.flush()
    assert committed(local_table) == ["a.jpg"]


def test_a_run_that_was_thought_dead_is_refused_when_it_wakes_up(table, tmp_path):
    shard = listing_shard(tmp_path, photo("a"))
    asleep = Committer(table, AUDIT_TABLE, "r1")
    asleep.add(stage(rows(photo("a")), table, "r1"))
    heir = Committer(table, AUDIT_TABLE, "r2")
    assert to_do(shard, table, version=heir.version) == [("a", "e1")]
    heir.add(stage(rows(photo("a")), table, "r2"))
    heir.flush()
    with pytest.raises(OSError, match="another audit has written"):
        asleep.flush()
    asleep.flush()  # has nothing more to say
    assert committed(table) == ["a"]


def test_a_run_that_wakes_up_between_two_commits_of_its_heir_stops_both_rather_than_double(table):
    asleep = Committer(table, AUDIT_TABLE, "r1")
    heir = Committer(table, AUDIT_TABLE, "r2")  # has subtracted at this version
    asleep.add(stage(rows(photo("a")), table, "r1"))
    asleep.flush()
    heir.add(stage(rows(photo("a")), table, "r2"))
    with pytest.raises(OSError, match="another audit has written"):
        heir.flush()
    assert committed(table) == ["a"]


def test_a_commit_comes_by_itself_when_the_last_is_a_while_ago(local_table, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(ledger.time, "monotonic", lambda: clock[0])
    committer = Committer(local_table, AUDIT_TABLE, "r1")
    committer.add(stage(rows(photo("a")), local_table, "r1"))
    committer.flush(if_due=True)
    assert committed(local_table) == []
    clock[0] += ledger.COMMIT_EVERY_SECONDS
    committer.flush(if_due=True)
    assert committed(local_table) == ["a"]
    committer.add(stage(rows(photo("b")), local_table, "r1"))
    committer.flush(if_due=True)
    assert committed(local_table) == ["a"]


class LosesTheAnswer:
    """Commits are written but reported as refused: the answer was lost and the next try refused."""

    def __init__(self, table):
        self._table = table

    def __getattr__(self, name):
        return getattr(self._table, name)

    def create_write_transaction(self, *arguments, **options):
        self._table.create_write_transaction(*arguments, **options)
        raise CommitFailedError("Concurrent transaction failed.")


def test_a_commit_whose_answer_is_lost_counts_once(local_table, monkeypatch):
    committer = Committer(local_table, AUDIT_TABLE, "r1")
    monkeypatch.setattr(committer, "_table", LosesTheAnswer(committer._table))
    for name in "ab":
        committer.add(stage(rows(photo(name)), local_table, "r1"))
        committer.flush()
    assert committed(local_table) == ["a", "b"]


def test_a_commit_that_was_broken_off_is_not_made_again(local_table, monkeypatch):
    """Ctrl-C in the middle: the table may have it already."""
    committer = Committer(local_table, AUDIT_TABLE, "r1")
    committer.add(stage(rows(photo("a")), local_table, "r1"))

    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        table = LosesTheAnswer(committer._table)
        table.update_incremental = interrupt
        patch.setattr(committer, "_table", table)
        with pytest.raises(KeyboardInterrupt):
            committer.flush()
    committer.flush()
    assert committed(local_table) == ["a"]


def test_all_is_to_do_where_there_is_no_table(table, tmp_path):
    shard = listing_shard(tmp_path, photo("a"), photo("b"))
    assert to_do(shard, table) == [("a", "e1"), ("b", "e1")]
    assert not storage.exists(table)


def test_the_to_do_is_the_listing_minus_the_table(table, tmp_path):
    commit(table, photo("a"), photo('it\'s "b"\n?'), photo("deleted since"))
    shard = listing_shard(tmp_path, photo("a"), photo('it\'s "b"\n?'), photo("new"))
    assert to_do(shard, table) == [("new", "e1")]


@pytest.mark.parametrize("folder", ["𠮷田", "😀", "\U0010ffff", "\x7f\u2028", 'a\\"b'])
def test_photos_in_a_folder_of_any_characters_are_known(local_table, tmp_path, folder):
    """The log's reader once took a plane of characters for another one, and such photos for unknown."""
    photos = [photo(f"/photos/{folder}/{n}.jpg") for n in range(3)]
    commit(local_table, *photos)
    assert to_do(listing_shard(tmp_path, *photos), local_table) == []


def test_another_version_of_a_photo_and_another_digest_are_to_do_again(local_table, tmp_path):
    commit(local_table, photo("a", "e1"))
    shard = listing_shard(tmp_path, photo("a", "e2"))
    assert to_do(shard, local_table) == [("a", "e2")]
    shard = listing_shard(tmp_path, photo("a", "e1"))
    assert to_do(shard, local_table) == []
    assert to_do(shard, local_table, digest="a2") == [("a", "e1")]
    commit(local_table, photo("a", "e1"), digest="a2")
    assert to_do(shard, local_table, digest="a2") == []
    assert to_do(shard, local_table) == []


def test_photos_that_are_staged_only_are_still_to_do(local_table, tmp_path):
    open_table(local_table, AUDIT_TABLE)
    stage(rows(photo("a")), local_table, "r1")
    assert to_do(listing_shard(tmp_path, photo("a")), local_table) == [("a", "e1")]


def test_what_was_committed_after_the_version_is_still_to_do(table, tmp_path):
    before = Committer(table, AUDIT_TABLE, "r1").version
    commit(table, photo("a"))
    shard = listing_shard(tmp_path, photo("a"))
    assert to_do(shard, table, version=before) == [("a", "e1")]
    assert to_do(shard, table, version=before + 1) == []


def test_a_listing_in_any_order_is_subtracted_from_many_files(local_table, tmp_path):
    names = [f"{n:03d}" for n in range(90)]
    for start in range(0, 90, 10):
        commit(local_table, *[photo(name) for name in names[start : start + 10]])
    shuffled = [*names[::-1][::2], "new, first", "zzz, new, last", *names[::2]]
    shard = listing_shard(tmp_path, *[photo(name) for name in shuffled])
    assert to_do(shard, local_table) == [("new, first", "e1"), ("zzz, new, last", "e1")]


def test_a_staged_file_says_how_large_it_is_and_how_many_rows_it_has(local_table):
    staged = stage(rows(photo("a"), photo("b")), local_table, "r1")
    assert os.path.getsize(f"{local_table}/{staged.path}") == staged.size
    assert staged.rows == 2
    assert stage(rows(photo("a")), local_table, "r1").path != staged.path


def test_the_log_counts_rows_without_reading_the_files(local_table):
    commit(local_table, photo("a"), photo("b"))
    actions = pa.table(delta(local_table).get_add_actions(flatten=True))
    assert actions["num_records"].to_pylist() == [2]
    # What lets a reader skip the file.
    assert (actions["min.uri"].to_pylist(), actions["max.uri"].to_pylist()) == (["a"], ["b"])
    assert actions["min.audit_digest"].to_pylist() == actions["max.audit_digest"].to_pylist() == ["a1"]


def first_row(table, reader):
    """The one row as another program reads it."""
    if reader == "polars":
        # Polars has its own names for timeouts and retries.
        options = {k: v for k, v in storage_options(table).items() if k.startswith("AWS_")}
        return polars.scan_delta(table, storage_options=options).collect().row(0, named=True)
    if reader == "duckdb":
        files = delta(table).file_uris()
        found = duckdb.sql(
            f"SET TimeZone='UTC'; SELECT * FROM read_parquet({json.dumps(files)})".replace('"', "'")
        )
        return found.to_arrow_table().to_pylist()[0]
    return pa.table(QueryBuilder().register("t", delta(table)).execute("SELECT * FROM t")).to_pylist()[0]


@pytest.mark.parametrize("reader", ["deltalake", "polars", "duckdb"])
def test_other_programs_read_the_table_with_both_kinds_of_time_intact(local_table, reader):
    commit(local_table, photo("a"))
    row = first_row(local_table, reader)
    assert list(row) == AUDIT_TABLE.names
    assert row["captured_at"] == TAKEN
    assert row["captured_at"].tzinfo is None
    assert row["audited_at"] == NOW
    assert (row["uri"], row["blurred_fraction"], row["mask"], row["error"]) == ("a", 0.25, b"\x89PNG", None)


def test_polars_reads_the_table_on_s3(s3, tmp_path):
    table = f"s3://out/{tmp_path.name}/table"
    commit(table, photo("a"))
    assert first_row(table, "polars")["captured_at"] == TAKEN
