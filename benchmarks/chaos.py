"""Exactly once, whatever dies when: ``python -m benchmarks.chaos`` (a quick look: ``--kills 5``). Linux only.

Photos on a real S3 server are audited into one ``--out``. Again and again the audit is started, something of
it is killed at a random instant, and photos are added and replaced. A last undisturbed run ends it; then each
photo version must have exactly one row with its mask. Exits with 1 where that isn't so, where a run never
ended, or where more than 60 seconds of work were repeated.

``seconds_repeated`` is the most that a kill can have cost: all the time since the run's last commit, or since
its start where it made none; 0 where the run went on and ended well. ``rows_orphaned`` are rows that were
written and never committed, so far: that work was done again.
"""

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from s3fs import S3FileSystem

from benchmarks.chaos_verdict import verdict
from benchmarks.chaos_world import ENDS_WITHIN_S, OUT, Archive, Run, Server
from benchmarks.deltalog import DeltaLog
from benchmarks.photos import small_photos
from benchmarks.processes import of_session
from benchmarks.tables import write_csv
from infra.s3_server import s3_server

KILLS = 50
MOST_REPEATED_S = 60.0

# Who is killed how often in 25, and when.
VICTIMS = {
    "driver": 6,  # kill -9 of its process alone
    "driver and Ray": 3,  # of all its processes at once, as when the machine goes
    "task worker": 3,
    "detector": 3,
    "raylet": 2,
    "gcs": 1,
    "S3 server": 4,  # and started again after a second or two
    "SIGTERM": 2,
    "sleeper": 1,  # the driver is stopped until another run has taken over, then wakes up
}
MOMENTS = ("start", "Ray starts", "detecting", "staged", "committed", "end")
# What has no process yet at the first moments, or none any more at the last.
WHILE_WORKING = {
    "task worker": ("detecting", "staged"),
    "detector": ("detecting", "staged", "committed"),
    "raylet": ("Ray starts", "detecting", "staged"),
    "gcs": ("Ray starts", "detecting", "staged"),
    "sleeper": ("detecting", "staged", "committed"),
}
# Up to so many seconds after the moment.
DELAYS = {"start": 6.0, "Ray starts": 8.0, "detecting": 6.0, "staged": 0.3, "committed": 0.05, "end": 3.0}
# Those that leave nobody who works on.
AT_ONCE = ("driver", "driver and Ray", "raylet", "gcs", "SIGTERM")


@dataclass(frozen=True)
class Settings:
    """Kill parts of an audit at random instants and count lost, doubled and repeated rows."""

    kills: int = KILLS
    """Kills; results/chaos.csv is written for no fewer than the default."""
    seed: int = 0
    """Of victims, moments and photos."""


@dataclass(frozen=True)
class Killed:
    """When, in seconds since 1970, and what the run was at."""

    at: float
    phase: str


def kill(server: Server, run: Run, victim: str, moment: str) -> Killed | None:
    """Kill ``victim`` a random while after ``moment``; None when the run ended before."""
    archive, process, pid = run.archive, run.process, None
    delay = archive.rng.uniform(0, DELAYS[moment])
    due: float | None = None
    while due is None or time.time() < due or pid is None:
        if process.poll() is not None:
            return None
        run.look()
        if due is None and run.is_at(moment):
            due = time.time() + delay
        if due is not None and time.time() >= due - 0.02:
            pid = {"S3 server": server.pid, "driver and Ray": process.pid}.get(victim)
            pid = pid or (process.pid if victim in ("driver", "SIGTERM", "sleeper") else run.find(victim))
        time.sleep(0.01 if due is None else max(0.0, min(0.02, due - time.time())))
    killed = Killed(time.time(), run.phase())
    match victim:
        case "S3 server":
            server.kill()
            time.sleep(archive.rng.uniform(1, 2))
            server.start_again(archive.fs)
        case "driver and Ray":
            for member in of_session(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, signal.SIGKILL)
        case "SIGTERM":
            process.terminate()
        case "sleeper":
            os.kill(pid, signal.SIGSTOP)
        case _:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return killed


def take_over(run: Run, stderr: Path) -> str:
    """While ``run`` sleeps, start others until one gets the lock; wake the sleeper in the middle of its work.

    Returns:
        how long it took until another run could begin, and what came of that one.
    """
    slept, rows = time.time(), run.archive.log.rows
    while True:
        with contextlib.closing(Run(run.archive, stderr)) as other:
            if not other.has_begun() and time.time() - slept < ENDS_WITHIN_S:
                continue
            waited = time.time() - slept
            other.wait_for_commit()
            os.kill(run.process.pid, signal.SIGCONT)
            code = other.end()
            run.archive.log.read_new()
            more = run.archive.log.rows - rows
            return f"other run began after {waited:.0f} s, exit {code}, {more} rows; "


def deck(rng: random.Random, kills: int) -> list[tuple[str, str]]:
    """Victims and moments in random order, each victim as often as VICTIMS says."""
    drawn: list[str] = []
    while len(drawn) < kills:
        some = [victim for victim, weight in VICTIMS.items() for _ in range(weight)]
        drawn += rng.sample(some, len(some))
    return [(victim, rng.choice(WHILE_WORKING.get(victim, MOMENTS))) for victim in drawn[:kills]]


def one_round(
    archive: Archive, server: Server, logs: Path, victim: str, moment: str
) -> dict[str, Any] | None:
    """Start a run, kill ``victim`` and say what came of it; None when the run ended before."""
    archive.refill()
    with contextlib.closing(Run(archive, logs.with_suffix(".log"))) as run:
        killed = kill(server, run, victim, moment)
        repeated, note = 0.0, ""
        if killed and victim == "sleeper":
            run.look()
            repeated = run.seconds_since_commit(killed.at)
            note = take_over(run, logs.with_suffix(".other.log"))
        code, ended = run.end(), time.time()
    archive.take_stock()
    if killed is None:
        return None
    if code != 0 and victim != "sleeper":
        repeated = run.seconds_since_commit(killed.at if victim in AT_ONCE else ended)
    return {
        "victim": victim,
        "moment": moment,
        "phase": killed.phase,
        "seconds_until_kill": f"{killed.at - run.began:.2f}",
        "exit_code": "never ended" if code is None else code,
        "seconds_until_end": f"{ended - killed.at:.1f}",
        "rows_committed": archive.log.rows,
        "rows_orphaned": archive.orphaned(),
        "rows_lost": "",
        "rows_doubled": archive.committed.total() - len(archive.committed),
        "seconds_repeated": f"{repeated:.1f}",
        "processes_left": " + ".join(run.left),
        "note": note + run.error(),
    }


def rounds(archive: Archive, server: Server, folder: Path, kills: int) -> list[dict[str, Any]]:
    """Kill so many times; return what came of each."""
    rows = []
    for number, (victim, moment) in enumerate(deck(archive.rng, kills), 1):
        while (row := one_round(archive, server, folder / f"{number:03d}", victim, moment)) is None:
            print(f"round {number}: the run ended before {victim} at {moment}", file=sys.stderr)
            moment = archive.rng.choice(WHILE_WORKING.get(victim, MOMENTS))
        rows.append({"round": number} | row)
        said = ", ".join(f"{key} {value}" for key, value in rows[-1].items() if value != "")
        print(said, file=sys.stderr, flush=True)
    return rows


def last_run(archive: Archive, stderr: Path) -> dict[str, int]:
    """Let a run end undisturbed and return its verdict. Exits where that run fails."""
    waiting = len(archive.missing())
    with contextlib.closing(Run(archive, stderr)) as run:
        code = run.end()
    if code != 0:
        sys.exit(f"the last run failed with {code}:\n{stderr.read_text()}")
    archive.take_stock()
    return verdict(archive, json.loads(run.stdout.splitlines()[-1]), waiting)


def main() -> int:
    """Kill, finish, count; write results/chaos.csv for no fewer kills than KILLS."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.chaos", description=__doc__)
    rng = random.Random(settings.seed)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("AWS_") and k != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory() as name, s3_server(Path(name) / "s3", ["photos", "out"]) as address:
        folder = Path(name)
        server = Server(folder / "s3")
        fs = S3FileSystem(
            key=address.access_key,
            secret=address.secret_key,
            endpoint_url=address.endpoint_url,
            use_listings_cache=False,
        )
        environment = clean | address.environment()
        archive = Archive(fs, environment, rng, small_photos(rng), DeltaLog(fs, f"{OUT}/table"))
        try:
            rows = rounds(archive, server, folder, settings.kills)
            wrong = last_run(archive, folder / "last.log")
        finally:
            server.stop()
    repeated = max(float(row["seconds_repeated"]) for row in rows)
    never_ended = sum(row["exit_code"] == "never ended" for row in rows)
    rows.append(
        dict.fromkeys(rows[0], "")
        | {
            "round": "all",
            "exit_code": 0,
            "rows_committed": archive.log.rows,
            "rows_orphaned": archive.orphaned(),
            "rows_lost": wrong["lost"],
            "rows_doubled": wrong["doubled"],
            "seconds_repeated": f"{repeated:.1f}",
            "note": ", ".join(f"{key} {value}" for key, value in wrong.items()),
        }
    )
    if settings.kills >= KILLS:
        write_csv("chaos", rows)
    else:
        print(rows[-1])
    return 1 if any(wrong.values()) or never_ended or repeated > MOST_REPEATED_S else 0


if __name__ == "__main__":
    sys.exit(main())
