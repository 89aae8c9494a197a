"""Storage that fails: what passes is waited for, what doesn't is said, nothing hangs and nothing is lost."""

import io
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from s3fs import S3FileSystem

from infra.s3_server import S3Server
from jobs.audit import main
from pipeline import storage
from pipeline.fetch import fetch
from pipeline.listing import write_listing
from tests.e2e.fault_proxy import Fault, FaultProxy, fault_proxy
from tests.e2e.harness import (
    JOB_WITHIN_S,
    ROOT,
    SMALL,
    Cluster,
    Ran,
    audit,
    audit_command,
    free_ports,
    ray_cluster,
    rows,
)

pytestmark = pytest.mark.e2e

PHOTOS = 40


@pytest.fixture(scope="module")
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    """A proxy in front of the S3 server; within this module every client goes through it."""
    with pytest.MonkeyPatch.context() as patch, fault_proxy(s3.endpoint_url) as proxy:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        S3FileSystem.clear_instance_cache()
        yield proxy
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def cluster(proxy: FaultProxy) -> Iterator[Cluster]:
    """A cluster whose workers go through the proxy."""
    with ray_cluster(2) as cluster:
        yield cluster


@pytest.fixture
def joined(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)


@pytest.fixture(scope="module")
def archive(proxy: FaultProxy) -> str:
    noise = np.random.default_rng(0)
    for number in range(PHOTOS):
        jpeg = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (48, 64, 3), np.uint8)).save(jpeg, "JPEG")
        storage.write_bytes(f"s3://photos/faults/{number:02d}.jpg", jpeg.getvalue())
    return "s3://photos/faults"


def photo(numbers: str) -> str:
    """A pattern for the photos with these numbers: ``1[0-4]``."""
    return rf"^/photos/faults/(?:{numbers})\.jpg"


def found(s3: S3Server, table: str) -> dict[str, str]:
    """Number and status of the photos in a table, each of which has one row.

    It is read past the proxy: ``is_deltatable`` waits with Python's lock held.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3.endpoint_url)
        all_rows = rows(table)
    assert len({row["uri"] for row in all_rows}) == len(all_rows)
    return {row["uri"][-6:-4]: row["status"] for row in all_rows}


def only_error(ran: Ran) -> str:
    """The one line that says why a command failed."""
    assert ran.code == 1, ran.err
    assert "Traceback" not in ran.err
    (error,) = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert ran.err.splitlines()[-1] == error
    return error


@pytest.mark.usefixtures("joined")
def test_faults_that_pass_cost_no_photo(archive: str, proxy: FaultProxy, model: Path, s3: S3Server) -> None:
    faults = (
        Fault("slow_down", r"list-type=2.*prefix=faults", times=1),
        Fault("slow_down", photo("0."), times=2),
        Fault("internal_error", photo("1[0-4]"), times=1),
        Fault("reset", photo("1[5-9]"), times=2),
        Fault("cut", photo("2."), times=1),
        Fault("truncated", photo("30"), times=1),
        Fault("slow_down", "^/out/passing/(?!table/_delta)", method="PUT", times=2, share=0.7),
        Fault("reset", "^/out/passing/.*parquet", method="PUT", times=1),
        Fault("lost_answer", "^/out/passing/table/part", method="PUT", times=1),
        Fault("slow_down", "^/out/passing/.*_delta_log", method="PUT", times=2),
        Fault("slow_down", "^/out/passing", times=1, share=0.5),
        Fault("cut", "^/out/passing/.*parquet", times=1),
    )
    with proxy.faults(*faults) as done:
        ran = audit(archive, "--out", "s3://out/passing", "--model", model, *SMALL)
    assert ran.result["by_status"] == {"ok": PHOTOS}, ran.err
    assert [fault for fault in faults if not done[fault]] == []
    assert found(s3, "s3://out/passing/table") == {f"{n:02d}": "ok" for n in range(PHOTOS)}


@pytest.mark.long
@pytest.mark.usefixtures("joined")
def test_faults_that_stay_are_failures_and_the_next_run_does_just_those_photos(
    archive: str, proxy: FaultProxy, model: Path, s3: S3Server
) -> None:
    expected = {
        "denied": "0[0-1]",
        "changed": "0[2-3]",
        "archived": "04",
        "missing": "05",
        "slow_down": "06",
        "reset": "07",
        "truncated": "08",
    }
    called = {"slow_down": "throttled", "reset": "timeout", "truncated": "timeout"}
    faults = [Fault(kind, photo(numbers)) for kind, numbers in expected.items()]
    command = (archive, "--out", "s3://out/staying", "--model", model, "--fail-on-errors", *SMALL)
    with proxy.faults(*faults):
        ran = audit(*command)
    assert ran.code == 3, ran.err
    failed = found(s3, "s3://out/staying/failures")
    assert failed == {
        number: called.get(kind, kind)
        for number in (f"{n:02d}" for n in range(9))
        for kind, numbers in expected.items()
        if re.fullmatch(numbers, number)
    }
    done = found(s3, "s3://out/staying/table")
    assert done == {f"{n:02d}": "ok" for n in range(9, PHOTOS)}
    assert ran.result["by_status"] == {"ok": len(done), **Counter(failed.values())}

    again = audit(*command)
    assert again.code == 0, again.err
    assert (again.result["photos"], again.result["by_status"]) == (len(failed), {"ok": len(failed)})
    assert found(s3, "s3://out/staying/table") == {f"{n:02d}": "ok" for n in range(PHOTOS)}


@pytest.mark.long
@pytest.mark.usefixtures("joined")
def test_an_archive_that_is_mostly_denied_ends_the_run_and_what_was_read_stays(
    archive: str, proxy: FaultProxy, model: Path, s3: S3Server
) -> None:
    command = (archive, "--out", "s3://out/mostly-denied", "--model", model, *SMALL)
    with proxy.faults(Fault("denied", photo("[0-2][0-9]"))):  # 30 of 40
        ran = audit(*command)
        assert re.search(r"\d+ of \d+ photos read are denied, of 40 listed.*--max-denied 1", only_error(ran))
        assert set(found(s3, "s3://out/mostly-denied/failures").values()) == {"denied"}
        # Who knows that they are denied goes on; those ten that can be read are done by now.
        allowed = audit(*command, "--max-denied", "1")
    assert allowed.code == 0, allowed.err
    assert found(s3, "s3://out/mostly-denied/table") == {f"{n:02d}": "ok" for n in range(30, PHOTOS)}


@pytest.mark.long
@pytest.mark.usefixtures("joined")
def test_a_server_that_goes_away_ends_the_run_in_one_line_and_the_next_run_completes_it(
    archive: str, proxy: FaultProxy, model: Path, s3: S3Server
) -> None:
    command = (archive, "--out", "s3://out/gone", "--model", model, *SMALL)
    driver = subprocess.Popen(
        audit_command(*command), **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    )
    try:
        with proxy.faults(Fault("trickle", photo("39"))) as done:
            deadline = time.monotonic() + JOB_WITHIN_S
            while not done and driver.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            proxy.down()
            try:
                out, said = driver.communicate(timeout=JOB_WITHIN_S)
            finally:
                proxy.up()
    finally:
        driver.kill()
    error = only_error(Ran(driver.returncode, out.decode(), said.decode()))
    assert "nothing answers at" in error or "error sending request" in error
    assert out == b""

    audit(*command)
    assert found(s3, "s3://out/gone/table") == {f"{n:02d}": "ok" for n in range(PHOTOS)}


def test_a_listing_that_fails_midway_fails_the_run_and_is_no_listing(
    proxy: FaultProxy, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, _ = storage.filesystem("s3://photos")
    fs.pipe({f"photos/many/{number}.jpg": b"" for number in range(6)})

    def in_small_pages(method: str, **options: Any) -> Any:
        more = {"MaxKeys": 4} if method == "list_objects_v2" else {}
        return S3FileSystem.call_s3(fs, method, **options, **more)

    monkeypatch.setattr(fs, "call_s3", in_small_pages)
    with proxy.faults(Fault("denied", r"list-type=2.*token")) as done:
        code = main(["s3://photos/many", "--out", "s3://out/midway", "--model", str(model)])
    assert sum(done.values()) == 1
    assert "s3://photos/many" in only_error(Ran(code, "", capsys.readouterr().err))
    assert storage.list_files("s3://out/midway", "settings.json") == []


@pytest.mark.parametrize("which", ["source", "--out"])
@pytest.mark.parametrize(
    ("bucket", "name", "value", "said"),
    [
        pytest.param(
            "photos", "AWS_SECRET_ACCESS_KEY", "notthesecret", "check AWS_SECRET_ACCESS_KEY", id="secret"
        ),
        pytest.param("photos", "AWS_ACCESS_KEY_ID", "nobodyskeyid", "check AWS_ACCESS_KEY_ID", id="key id"),
        pytest.param(
            "no-such-bucket", "AWS_REGION", "us-east-1", "no such bucket; check the URI", id="bucket"
        ),
        pytest.param("photos", "AWS_ENDPOINT_URL", None, "check AWS_ENDPOINT_URL", id="endpoint"),
    ],
)
def test_a_wrong_setting_stops_at_once_in_one_line_that_says_what_to_check(
    which: str,
    bucket: str,
    name: str,
    value: str | None,
    said: str,
    s3: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"no photo")
    places = {"source": str(tmp_path / "photos"), "--out": str(tmp_path / "out")}
    places[which] = f"s3://{bucket}/{tmp_path.name}"
    monkeypatch.setenv(name, value or f"http://127.0.0.1:{free_ports(1)[0]}")
    S3FileSystem.clear_instance_cache()
    asked = len(proxy.requests)
    try:
        assert main([places["source"], "--out", places["--out"], "--model", str(model)]) == 1
    finally:
        S3FileSystem.clear_instance_cache()
    captured = capsys.readouterr()
    error = only_error(Ran(1, captured.out, captured.err))
    assert said in error
    assert places[which] in error
    assert captured.out == ""
    assert s3.secret_key not in captured.err
    if value is not None and "KEY" in name:
        assert value not in captured.err
    # No refusal is asked for again, but for the log of a run that began.
    assert len(proxy.requests) - asked <= 3


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Half minutes become seconds, in this process; not less, for what must be faster than they are."""
    monkeypatch.setattr(storage, "BODY_SECONDS", 4)
    monkeypatch.setattr("pipeline.storage_errors.PATIENCE_SECONDS", 0)
    options = storage._S3_OPTIONS["config_kwargs"]
    monkeypatch.setitem(options, "read_timeout", 4)
    monkeypatch.setitem(options, "retries", {"mode": "standard", "total_max_attempts": 1})
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", ["trickle", "silence", "cut", "truncated"])
def test_a_read_that_does_not_end_is_a_timeout_and_keeps_no_other_waiting(
    kind: str, archive: str, proxy: FaultProxy
) -> None:
    etags = {name: etag_of(f"{archive}/{name}.jpg") for name in ("00", "01")}
    came: dict[str, str | None] = {}

    def read(name: str) -> None:
        came[name] = fetch(f"{archive}/{name}.jpg", etags[name], 2**20).status

    with proxy.faults(Fault(kind, photo("00"))) as done:
        stuck = threading.Thread(target=read, args=("00",))
        stuck.start()
        while not done:
            time.sleep(0.01)
        read("01")
        # The other two kinds end at once.
        assert kind in ("cut", "truncated") or "00" not in came
        stuck.join(JOB_WITHIN_S)
    assert came["01"] is None
    assert came["00"] == "timeout"


@pytest.mark.usefixtures("impatient")
def test_a_list_page_that_trickles_ends_too(
    archive: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "CALL_SECONDS", 1)
    with (
        proxy.faults(Fault("trickle", "list-type=2")),
        pytest.raises(TimeoutError, match="s3://photos/faults: "),
    ):
        write_listing(archive, str(tmp_path))


def etag_of(uri: str) -> str:
    fs, path = storage.filesystem(uri)
    return storage.info_etag(fs.info(path))
