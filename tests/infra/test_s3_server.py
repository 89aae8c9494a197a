import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import botocore.session
import pytest
from botocore.exceptions import ClientError
from s3fs import S3FileSystem

from infra.s3_server import S3Server, main, s3_server


def client_of(server: S3Server, secret: str | None = None) -> S3FileSystem:
    return S3FileSystem(
        key=server.access_key,
        secret=secret or server.secret_key,
        endpoint_url=server.endpoint_url,
        skip_instance_cache=True,
    )


def accepts_connections(server: S3Server) -> bool:
    try:
        socket.create_connection(("127.0.0.1", urlsplit(server.endpoint_url).port), timeout=1).close()
    except ConnectionRefusedError:
        return False
    return True


def test_what_is_put_is_got(s3: S3Server) -> None:
    data = bytes(range(256)) * 20_000
    client_of(s3).pipe("photos/round trip/ä.jpg", data)
    assert client_of(s3).cat("photos/round trip/ä.jpg") == data


def test_the_environment_alone_is_enough_for_a_client(s3: S3Server) -> None:
    assert {"photos", "out"} <= set(S3FileSystem().ls(""))


def test_a_wrong_secret_is_refused(s3: S3Server) -> None:
    client_of(s3).pipe("photos/secret.txt", b"mine")
    with pytest.raises(PermissionError):
        client_of(s3, secret="0" * 32).cat("photos/secret.txt")


def test_no_key_at_all_is_refused(s3: S3Server) -> None:
    client_of(s3).pipe("photos/secret.txt", b"mine")
    with pytest.raises(PermissionError):
        S3FileSystem(anon=True, endpoint_url=s3.endpoint_url, skip_instance_cache=True).cat(
            "photos/secret.txt"
        )


def test_an_object_that_has_changed_is_refused_under_its_old_etag(s3: S3Server) -> None:
    client = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=s3.endpoint_url,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        region_name="us-east-1",
    )
    old = client.put_object(Bucket="photos", Key="changing.txt", Body=b"before")["ETag"]
    client.get_object(Bucket="photos", Key="changing.txt", IfMatch=old)
    client.put_object(Bucket="photos", Key="changing.txt", Body=b"after")
    with pytest.raises(ClientError) as refused:
        client.get_object(Bucket="photos", Key="changing.txt", IfMatch=old)
    assert refused.value.response["Error"]["Code"] == "PreconditionFailed"


def test_a_bucket_that_nobody_made_is_not_made_by_writing_to_it(s3: S3Server) -> None:
    with pytest.raises(FileNotFoundError):
        client_of(s3).pipe("nobody-made-me/a.txt", b"a")


def test_a_user_may_do_what_it_may_and_nothing_else(tmp_path: Path) -> None:
    users = {
        "auditor": ["Read:photos", "List:photos", *(f"{verb}:out/night/*" for verb in ("Read", "Write"))]
    }
    with s3_server(tmp_path, buckets=["photos", "out"], users=users) as server:
        client_of(server).pipe("photos/a.jpg", b"photo")
        auditor = server.users["auditor"]
        user = client_of(auditor)
        assert user.cat("photos/a.jpg") == b"photo"
        assert user.find("photos") == ["photos/a.jpg"]
        user.pipe("out/night/a.txt", b"a")
        assert user.cat("out/night/a.txt") == b"a"
        for path in ("photos/b.jpg", "out/a.txt", "out/nightly.txt"):
            with pytest.raises(PermissionError):
                user.pipe(path, b"no")
        assert auditor.environment()["AWS_ACCESS_KEY_ID"] == auditor.access_key != server.access_key
        assert (tmp_path / "identities.json").stat().st_mode & 0o077 == 0


def test_the_environment_names_the_server_its_one_identity_and_nothing_else() -> None:
    server = S3Server("http://127.0.0.1:1", "key", "secret")
    assert server.environment() == {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def test_the_server_is_gone_after_the_block_and_its_objects_are_back_at_the_next_start(
    tmp_path: Path,
) -> None:
    with s3_server(tmp_path, buckets=["kept"]) as first:
        client_of(first).pipe("kept/a.txt", b"still here")
        assert accepts_connections(first)
    assert not accepts_connections(first)
    with s3_server(tmp_path) as second:
        assert second.secret_key != first.secret_key
        assert client_of(second).cat("kept/a.txt") == b"still here"


def test_a_server_that_cannot_start_says_why_with_the_tail_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weed = tmp_path / "weed"
    weed.write_text("#!/bin/sh\necho no room on the device\nexit 7\n")
    weed.chmod(0o755)
    monkeypatch.setattr("infra.s3_server._weed", lambda: str(weed))
    with (
        pytest.raises(RuntimeError, match=r"(?s)ended with code 7.*no room on the device"),
        s3_server(tmp_path / "data"),
    ):
        raise AssertionError("the block must not run")


def test_the_command_finds_the_uploaded_folder_whatever_account_was_set_and_its_exit_code_is_returned(
    tmp_path: Path,
) -> None:
    photos = tmp_path / "a=b"
    (photos / "below").mkdir(parents=True)
    (photos / "below" / "one.jpg").write_bytes(b"1")
    (photos / "empty.jpg").write_bytes(b"")
    command = (
        "import json, s3fs, sys;"
        "found = s3fs.S3FileSystem().find('inbox', detail=True);"
        "print(json.dumps({key: entry['size'] for key, entry in found.items()}));"
        "sys.exit(3)"
    )
    options = [str(tmp_path / "server"), "--buckets", "inbox", "--upload", f"{photos}=s3://inbox/sub/"]
    ended = subprocess.run(
        [sys.executable, "-m", "infra.s3_server", *options, "--", sys.executable, "-c", command],
        env=os.environ | {"AWS_PROFILE": "another", "AWS_SESSION_TOKEN": "another"},
        stdout=subprocess.PIPE,
    )
    assert json.loads(ended.stdout) == {"inbox/sub/below/one.jpg": 1, "inbox/sub/empty.jpg": 0}
    assert ended.returncode == 3


def test_without_a_command_nothing_starts_and_that_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "server")]) == 2
    assert "after --" in capsys.readouterr().err
    assert not (tmp_path / "server").exists()
