"""After a run: join small files, and remove what nothing refers to any more.

Whatever is removed is older than RETENTION, which is longer than any run: a file that a run has staged and
not yet committed is never taken away, nor one that a reader of an older version still reads.
"""

from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from pipeline import storage
from pipeline.delta import query, read_table
from pipeline.layout import AuditLayout, began, run_of_part
from pipeline.view import current_runs

RETENTION = timedelta(days=7)
# Listings are as large as the archive has keys; each source keeps its latest complete one.
LISTING_RETENTION = timedelta(days=30)
COMPACTED_BYTES = 64 << 20
COMPACT_FROM_FILES = 32
# Bins are in memory as a whole; but each reads its files one after the other, which on S3 is waiting.
BINS_AT_ONCE = 4
# What an interrupted compaction has joined until then stays joined.
COMPACTION_COMMITS_EVERY = timedelta(minutes=1)


def tidy(out: str) -> dict[str, int]:
    """Clean both tables under ``out`` and join their small files; for the run that holds the lock.

    Returns:
        ``compacted`` and ``removed``: files of the tables and mask shards.
    """
    layout, now = AuditLayout(out), datetime.now(UTC)
    tables = [table for uri in (layout.table, layout.failures) if (table := read_table(uri))]
    # The short work first: joining the files of a large first audit can outlast a night.
    removed = _remove_orphaned_mask_shards(layout, now)
    for table in tables:
        # "Full" finds staged files that no commit ever named, too.
        removed += len(table.vacuum(int(RETENTION.total_seconds() // 3600), dry_run=False, full=True))
        _clean_log(table)
    compacted = 0
    for table in tables:
        sizes = pa.table(table.get_add_actions())["size_bytes"]
        if (pc.sum(pc.less(sizes, COMPACTED_BYTES // 2)).as_py() or 0) >= COMPACT_FROM_FILES:
            done = table.optimize.compact(
                target_size=COMPACTED_BYTES,
                max_concurrent_tasks=BINS_AT_ONCE,
                min_commit_interval=COMPACTION_COMMITS_EVERY,
            )
            compacted += done["numFilesRemoved"]
            _clean_log(table)
    return {"compacted": compacted, "removed": removed}


def _clean_log(table: DeltaTable) -> None:
    table.create_checkpoint()
    table.cleanup_metadata()


def _remove_orphaned_mask_shards(layout: AuditLayout, now: datetime) -> int:
    """Remove tar shards that no row names."""
    old = {PurePosixPath(uri).name: uri for uri in storage.list_files(layout.masks, ".tar")}
    old = {name: uri for name, uri in old.items() if _age(run_of_part(name), now) > RETENTION}
    if not old:
        return 0
    sql = "SELECT DISTINCT split_part(mask_shard, '/', 1) AS shard FROM delta WHERE mask_shard IS NOT NULL"
    named = set(
        query(read_table(layout.table), sql, pa.schema([("shard", pa.string())]))["shard"].to_pylist()
    )
    orphans = [uri for name, uri in old.items() if name not in named]
    for uri in orphans:
        storage.remove(uri)
    return len(orphans)


def remove_old_lists(out: str) -> int:
    """Remove to-do lists of runs that died, and listings that no view needs any more; return how many files.

    For every run: a night without news has written a listing too.
    """
    layout, now = AuditLayout(out), datetime.now(UTC)
    needed = {run.run_id for run in current_runs(layout)}
    removed = 0
    for uri in storage.list_files(layout.runs, ".parquet"):
        run_id, *inside = uri.removeprefix(layout.runs + "/").split("/")
        age = _age(run_id, now)
        if ("to_do" in inside and age > RETENTION) or (age > LISTING_RETENTION and run_id not in needed):
            storage.remove(uri)
            removed += 1
    return removed


def _age(run_id: str, now: datetime) -> timedelta:
    """Since the run began, by its name; none where the name is no run's."""
    then = began(run_id)
    return now - then if then else timedelta(0)
