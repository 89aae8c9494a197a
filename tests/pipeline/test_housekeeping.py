"""What is joined and what is removed after a run, and what never is."""

import json
import os
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder

from pipeline import housekeeping, storage
from pipeline.delta import open_table
from pipeline.housekeeping import (
    COMPACT_FROM_FILES,
    LISTING_RETENTION,
    RETENTION,
    remove_old_lists,
    tidy,
)
from pipeline.layout import AuditLayout, new_run_id
from pipeline.ledger import Committer, stage
from pipeline.schema import AUDIT_TABLE, FAILURES_TABLE

NOW = datetime.now(UTC)


@pytest.fixture
def out(tmp_path):
    layout = AuditLayout(str(tmp_path / "out"))
    open_table(layout.table, AUDIT_TABLE)
    open_table(layout.failures, FAILURES_TABLE)
    settings(layout, run_id(timedelta(0)), "/photos")
    return layout


def settings(out, run, source):
    said = {"run_id": run, "started_at": NOW.isoformat(), "source": source, "listing_complete": True}
    said |= {"audit_digest": "a1", "model_digest": "m1", "model": "m", "working_size": 640}
    content = json.dumps({**said, "listed": 1, "skipped_by_suffix": {}, "limit": None})
    storage.write_bytes(out.run(run).settings, content.encode())


def row(uri, **columns):
    made = {"uri": uri, "etag": "e1", "size_bytes": 1, "status": "ok", "mask": b"\x89PNG"}
    made |= {"model_digest": "m1", "audit_digest": "a1", "run_id": "r1", "audited_at": NOW, **columns}
    return pa.Table.from_pylist([made], schema=AUDIT_TABLE)


def commit(out, *tables):
    committer = Committer(out.table, AUDIT_TABLE, "r1")
    for table in tables:
        committer.add(stage(table, out.table, "r1"))
    committer.flush()


def uris(out):
    found = QueryBuilder().register("t", DeltaTable(out.table)).execute("SELECT uri FROM t ORDER BY uri")
    return pa.table(found)["uri"].to_pylist()


def age(path, by):
    then = time.time() - by.total_seconds()
    os.utime(path, (then, then))


def run_id(before_now):
    return new_run_id(NOW - before_now)[:-6] + "abcdef"


def test_many_small_files_become_one_with_the_same_rows(out):
    names = [f"{n:03d}" for n in range(COMPACT_FROM_FILES)]
    commit(out, *[row(name) for name in names])
    assert tidy(out.out) == {"compacted": COMPACT_FROM_FILES, "removed": 0}
    assert uris(out) == names
    actions = pa.table(DeltaTable(out.table).get_add_actions(flatten=True)).to_pylist()
    # The one file can still be skipped by its keys.
    assert [(a["min.uri"], a["max.uri"], a["min.audit_digest"]) for a in actions] == [
        ("000", names[-1], "a1")
    ]
    # A reader of the version before still finds its files.
    before = QueryBuilder().register("t", DeltaTable(out.table, version=1)).execute("SELECT mask FROM t")
    assert pa.table(before).num_rows == len(names)


def test_a_compaction_commits_on_the_way_what_it_has_joined(out, monkeypatch):
    names = [f"{n:03d}" for n in range(COMPACT_FROM_FILES)]
    commit(out, *[row(name, mask=os.urandom(1000)) for name in names])
    monkeypatch.setattr(housekeeping, "COMPACTED_BYTES", 30_000)
    monkeypatch.setattr(housekeeping, "COMPACTION_COMMITS_EVERY", timedelta(0))
    assert tidy(out.out)["compacted"] == COMPACT_FROM_FILES
    joined = [e for e in DeltaTable(out.table).history() if e["operation"] == "OPTIMIZE"]
    assert len(joined) > 1
    assert uris(out) == names


def test_a_few_files_are_left_as_they_are(out):
    commit(out, row("a"), row("b"))
    assert tidy(out.out) == {"compacted": 0, "removed": 0}
    assert len(DeltaTable(out.table).file_uris()) == 2


def test_a_run_can_commit_after_the_table_was_compacted(out):
    commit(out, *[row(f"{n:03d}") for n in range(COMPACT_FROM_FILES)])
    tidy(out.out)
    commit(out, row("new"))
    assert len(uris(out)) == COMPACT_FROM_FILES + 1


def test_staged_files_that_no_commit_named_go_after_the_retention_and_not_before(out):
    commit(out, row("a"))
    young, old = (stage(row(name), out.table, "r0") for name in ("young", "old"))
    age(Path(out.table, old.path), RETENTION + timedelta(hours=1))
    age(Path(out.table, young.path), RETENTION - timedelta(hours=1))
    age(DeltaTable(out.table).file_uris()[0], RETENTION * 10)  # committed, however old
    assert tidy(out.out)["removed"] == 1
    assert not Path(out.table, old.path).exists()
    assert Path(out.table, young.path).exists()
    assert uris(out) == ["a"]


def test_mask_shards_that_no_row_names_go_after_the_retention(out):
    names = {
        "named": f"part-{run_id(RETENTION * 2)}-1.tar",
        "orphan": f"part-{run_id(RETENTION * 2)}-2.tar",
        "young orphan": f"part-{run_id(RETENTION / 2)}-3.tar",
        "not ours": "holiday.tar",
    }
    Path(out.masks).mkdir(parents=True)
    for name in names.values():
        Path(out.masks, name).write_bytes(b"tar")
    commit(out, row("a", mask_shard=f"{names['named']}/00000-a.png"))
    assert tidy(out.out)["removed"] == 1
    assert sorted(os.listdir(out.masks)) == sorted(set(names.values()) - {names["orphan"]})


def lists(out, run, folder):
    path = Path(out.run(run).root, folder, "part-00000.parquet")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"list")
    return path


def test_old_lists_go_but_the_one_that_the_view_needs(out):
    long_ago = LISTING_RETENTION + timedelta(days=1)
    needed, replaced, new = run_id(long_ago), run_id(long_ago * 2), run_id(timedelta(days=1))
    settings(out, replaced, "/other")
    settings(out, needed, "/archive")
    settings(out, new, "/other")
    kept = [lists(out, needed, "listing"), lists(out, new, "listing"), lists(out, new, "to_do")]
    foreign = Path(out.runs, "mine.parquet")
    foreign.touch()
    kept.append(foreign)
    gone = [lists(out, replaced, "listing"), lists(out, replaced, "to_do")]
    assert remove_old_lists(out.out) == len(gone)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)


def test_a_run_without_failures_has_one_table_to_tidy(out):
    shutil.rmtree(out.failures)
    assert tidy(out.out) == {"compacted": 0, "removed": 0}


def test_tables_on_s3_are_tidied_too(s3, tmp_path):
    out = AuditLayout(f"s3://out/{tmp_path.name}")
    commit(out, *[row(f"{n:03d}") for n in range(COMPACT_FROM_FILES)])
    settings(out, run_id(timedelta(0)), "s3://photos")
    assert tidy(out.out) == {"compacted": COMPACT_FROM_FILES, "removed": 0}
