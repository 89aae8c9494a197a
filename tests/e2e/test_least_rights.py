"""An audit by a user who may read the archive and write below the output's prefix; nothing tells its keys."""

import fnmatch
import io
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from infra.s3_server import S3Server, fill, s3_server
from jobs.audit import main
from tests.e2e.fault_proxy import Fault, FaultProxy, fault_proxy
from tests.e2e.harness import JOB_WITHIN_S, ROOT, SMALL, audit_command

pytestmark = pytest.mark.e2e

POLICY = json.loads((ROOT / "infra/iam-policy.json").read_text())
READ = ["Read:archive", "List:archive"]
USERS = {
    "auditor": [*READ, *(f"{verb}:audits/photos/*" for verb in ("Read", "List", "Write"))],
    "reader": READ,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, sample_archive: Path) -> Iterator[S3Server]:
    """A server with the buckets of the policy, some photos, and users of few rights."""
    with s3_server(tmp_path_factory.mktemp("rights"), ["archive", "audits"], USERS) as server:
        fill(server, sample_archive / "photos/2024", "s3://archive/photos")
        yield server


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(server.endpoint_url) as proxy:
        yield proxy


def become(user: S3Server, proxy: FaultProxy, patch: pytest.MonkeyPatch) -> None:
    """Let every client from here on be this user, through the proxy."""
    for name, value in (user.environment() | {"AWS_ENDPOINT_URL": proxy.url}).items():
        patch.setenv(name, value)
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the local Ray of a run keeps its logs. A short path, for Ray puts sockets there."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long
def test_an_audit_needs_no_more_than_the_policy_and_tells_its_keys_to_nobody(
    server: S3Server,
    proxy: FaultProxy,
    model: Path,
    ray_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    auditor = server.users["auditor"]
    become(auditor, proxy, monkeypatch)
    keys = (auditor.access_key.encode(), auditor.secret_key.encode())
    titles = set()
    # A refusal that repeats the key id goes to the table of failures and to the report.
    with proxy.faults(Fault("missing", "rocket.jpg"), Fault("slow_down", "/audits/.*parquet", "PUT", 1)):
        driver = subprocess.Popen(
            audit_command("s3://archive/photos", "--out", "s3://audits/photos", "--model", model, *SMALL),
            **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
        )
        try:
            deadline = time.monotonic() + JOB_WITHIN_S
            while driver.poll() is None and time.monotonic() < deadline:
                titles |= command_lines()
                time.sleep(0.2)
        finally:
            driver.kill()
        out, said = driver.communicate()
    assert driver.returncode == 0, said.decode()
    assert json.loads(out.splitlines()[-1])["by_status"]["missing"] == 1

    asked = {needed(method, path) for method, path in proxy.requests}
    assert [request for request in asked if not is_allowed(*request)] == []
    used = {action for action, _, _ in asked}
    granted = {action for statement in POLICY["Statement"] for action in listed(statement["Action"])}
    # To abort is for uploads in parts that fail.
    assert used == granted - {"s3:AbortMultipartUpload"}

    admin = S3FileSystem(
        key=server.access_key,
        secret=server.secret_key,
        endpoint_url=server.endpoint_url,
        skip_instance_cache=True,
    )
    written = {path: admin.cat_file(path) for path in admin.find("audits")}
    assert all(path.startswith("audits/photos/") for path in written)
    assert {"log.txt", "report.html", "result.json"} <= {Path(path).name for path in written}
    logs = {path: path.read_bytes() for path in ray_folder.rglob("*") if path.is_file()}
    assert any(path.name.startswith("worker-") for path in logs)
    assert any(b"ray::" in title for title in titles)
    assert any(b"jobs.audit" in title for title in titles)
    tables = {
        f"{path}, unpacked": unpacked(data) for path, data in written.items() if path.endswith(".parquet")
    }
    assert any(b"refused to \xe2\x80\xa6 (NoSuchKey)" in text for text in tables.values())
    everything = {**written, **tables, **logs, "stdout": out, "stderr": said, "titles": b"\n".join(titles)}
    assert [place for place, text in everything.items() if any(key in text for key in keys)] == []


def test_who_may_not_write_the_output_is_told_so_before_any_work(
    server: S3Server,
    proxy: FaultProxy,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    become(server.users["reader"], proxy, monkeypatch)
    try:
        assert main(["s3://archive/photos", "--out", "s3://audits/photos", "--model", str(model)]) == 1
    finally:
        S3FileSystem.clear_instance_cache()
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: s3://audits/photos/")
    assert "access is denied; check that this identity may do this there" in error
    assert [path for _, path in proxy.requests if path.startswith("/archive")] == []


@pytest.mark.parametrize(
    ("action", "resource", "prefix"),
    [
        ("s3:PutObject", "archive/photos/a.jpg", None),
        ("s3:DeleteObject", "archive/photos/a.jpg", None),
        ("s3:GetObject", "archive/others/a.jpg", None),
        ("s3:PutObject", "audits/others/a.jpg", None),
        ("s3:ListBucket", "archive", ""),
        ("s3:ListBucket", "audits", "others/"),
        ("s3:GetBucketLocation", "audits", None),
    ],
)
def test_the_policy_grants_nothing_else(action: str, resource: str, prefix: str | None) -> None:
    assert not is_allowed(action, resource, prefix)


def command_lines() -> set[bytes]:
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.add((process / "cmdline").read_bytes())
        except OSError:
            continue  # it has ended
    return found


def unpacked(parquet: bytes) -> bytes:
    return json.dumps(
        pq.read_table(io.BytesIO(parquet)).to_pylist(), default=str, ensure_ascii=False
    ).encode()


def needed(method: str, path: str) -> tuple[str, str, str | None]:
    """What AWS wants for a request: an action, the bucket or object, and the prefix that is listed."""
    url = urlsplit(path)
    query = parse_qs(url.query, keep_blank_values=True)
    resource = url.path.lstrip("/")
    if "/" not in resource.rstrip("/"):
        if method == "GET" and "list-type" in query:
            return "s3:ListBucket", resource.rstrip("/"), query["prefix"][0]
        if method == "POST" and "delete" in query:
            # Which objects says its body; the server has refused all but those of the prefix.
            return "s3:DeleteObject", "audits/photos/*", None
        raise AssertionError(f"{method} {path} is about the bucket")
    actions = {
        "GET": "s3:GetObject",
        "HEAD": "s3:GetObject",
        "PUT": "s3:PutObject",
        "DELETE": "s3:DeleteObject",
    }
    if method == "POST" and ("uploads" in query or "uploadId" in query):
        return "s3:PutObject", resource, None
    return actions[method], resource, None


def is_allowed(action: str, resource: str, prefix: str | None) -> bool:
    return any(
        action in listed(statement["Action"])
        and any(fnmatch.fnmatchcase(f"arn:aws:s3:::{resource}", arn) for arn in listed(statement["Resource"]))
        and ("Condition" not in statement or matches_prefix(statement["Condition"], prefix))
        for statement in POLICY["Statement"]
        if statement["Effect"] == "Allow"
    )


def matches_prefix(condition: dict, prefix: str | None) -> bool:
    assert list(condition) == ["StringLike"]
    assert list(condition["StringLike"]) == ["s3:prefix"]
    patterns = listed(condition["StringLike"]["s3:prefix"])
    return prefix is not None and any(fnmatch.fnmatchcase(prefix, pattern) for pattern in patterns)


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
