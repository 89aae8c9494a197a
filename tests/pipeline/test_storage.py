"""Storage on this machine's disk, in memory, and on a real S3 server."""

import errno
import os
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from s3fs import S3FileSystem

from pipeline import storage, storage_errors
from pipeline.listing import local_uri
from pipeline.storage_errors import ChangedError, classify


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("/photos/", "/photos"),
        ("/photos/../other", "/other"),
        ("file:///photos", "/photos"),
        ("file://localhost/photos/", "/photos"),
        ("file:/photos", "/photos"),
        ("file:///a%20b/100%25", "/a b/100%"),
        ("/a%20b", "/a%20b"),  # a path is no URI
        ("s3://bucket/a%20b", "s3://bucket/a%20b"),
        ("s3://bucket/prefix/", "s3://bucket/prefix"),
        ("s3://bucket", "s3://bucket"),
        ("s3a://bucket/a", "s3://bucket/a"),
        ("GCS://bucket/A/", "gs://bucket/A"),
        ("/", "/"),
    ],
)
def test_normalize(given, normal):
    assert storage.normalize(given) == normal


@pytest.mark.parametrize("uri", ["file://photos/a", "file://"])
def test_a_file_uri_of_another_machine_is_refused(uri):
    with pytest.raises(ValueError, match="no file of this machine; write file:///"):
        storage.normalize(uri)


def test_a_file_uri_is_read_where_its_path_is(tmp_path):
    storage.write_bytes(str(tmp_path / "100% a b.txt"), b"x")
    uri = f"file://{tmp_path}/100%25%20a%20b.txt"
    assert storage.read_bytes(uri) == b"x"
    assert storage.is_inside(uri, str(tmp_path))
    assert storage.normalize(local_uri(os.fsdecode(b"/caf\xe9"))) == os.fsdecode(b"/caf\xe9")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAKEY:SEKRET@bucket/photos",
        "s3://AKIAKEY:SEK/RET+@bucket/photos",
        "s3://SEKRET@bucket/photos",
        "https://user:SEKRET@host/photos",
        "https://SEKRET@host/photos",
        "ftp://user:123456/SEKRET@host/photos",
        "sftp://user:123@host:22/photos",
        "https://host/photos?X-Amz-Credential=SEKRET&X-Amz-Signature=SEKRET",
        "s3://bucket/photos?AWSAccessKeyId=SEKRET",
        "https://account.blob.core.windows.net/photos?sv=2026&sig=SEKRET",
        "gs://bucket/photos?access_token=SEKRET",
        *(f"https://host/photos?page=2&{name}=SEKRET" for name in ("key", "api-key", "x.auth", "jwt", "pwd")),
        "https://host/photos#access_token=SEKRET",
        "https://host/photos;sig=SEKRET",
    ],
)
def test_a_uri_that_holds_credentials_is_refused_without_repeating_them(uri):
    with pytest.raises(ValueError, match=r"holds credentials.*AWS_ACCESS_KEY_ID") as caught:
        storage.normalize(uri)
    for secret in ("SEKRET", "SEK/RET", "123", "AKIAKEY", "user"):
        assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a@b:c/what?/x=1",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/mine/photos",
        "sftp://user@host:22/a:b@c",
        "abfs://container@account.dfs.core.windows.net/photos",
        "https://host:8443/photos?page=2&monkey=1&design=2",
        "http://host:8000/a@2x.jpg",
        "http://[::1]:9000/photos",
        "/photos/a:b@c?token=x",
    ],
)
def test_a_uri_without_credentials_is_not_refused(uri):
    assert storage.normalize(uri) == uri


def test_a_home_or_a_link_that_leads_nowhere_is_a_wrong_path(tmp_path):
    os.symlink("loop", tmp_path / "loop")
    for path in ("~nobody-of-this-name/photos", f"{tmp_path}/loop"):
        with pytest.raises(ValueError, match=r"Could not determine home|Symlink loop"):
            storage.normalize(path)


@pytest.mark.parametrize("nothing", ["", " ", "s3://", "gs:///"])
def test_an_empty_place_is_refused_as_it_may_be_a_variable_that_is_not_set(nothing):
    with pytest.raises(ValueError, match=r"(is empty|names no bucket or host); is a variable of the command"):
        storage.normalize(nothing)


@pytest.mark.parametrize(
    ("path", "bucket", "key"),
    [
        ("bucket/a/b.jpg", "bucket", "a/b.jpg"),
        ("bucket", "bucket", ""),
        ("bucket/accesspoint/b.jpg", "bucket", "accesspoint/b.jpg"),
        ("arn:aws:s3:eu-west-1:123456789012:accesspoint/mine", None, ""),
        ("arn:aws:s3:eu-west-1:123456789012:accesspoint/mine/a/b.jpg", None, "a/b.jpg"),
    ],
)
def test_an_access_point_is_a_bucket_with_a_slash_in_its_name(path, bucket, key):
    assert storage.split_bucket(path) == (
        bucket or "arn:aws:s3:eu-west-1:123456789012:accesspoint/mine",
        key,
    )


def test_an_object_may_be_named_as_it_likes(s3, tmp_path):
    uri = f"s3://out/{tmp_path.name}/a:b@c?token=x.jpg"
    storage.write_bytes(uri, b"x")
    assert storage.read_bytes(uri) == b"x"


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.normalize("photos") == str(tmp_path / "photos")
    assert storage.normalize(Path("photos")) == str(tmp_path / "photos")


@pytest.mark.parametrize(
    ("inner", "outer", "inside"),
    [
        ("/a", "/a", True),
        ("/a/b", "/a", True),
        ("/a", "/a/b", False),
        ("/ab", "/a", False),  # a sibling whose name begins alike
        ("/a/b", "/", True),
        ("/a/../b", "/a", False),
        ("s3://bucket/a/b", "s3://bucket/a/", True),
        ("s3://bucket/ab", "s3://bucket/a", False),
        ("s3://bucket2", "s3://bucket", False),
        ("/bucket/a", "s3://bucket", False),
        ("s3a://bucket/a", "s3://bucket", True),
        ("file:///a/b", "/a", True),
    ],
)
def test_is_inside(inner, outer, inside):
    assert storage.is_inside(inner, outer) is inside


def test_a_link_into_a_folder_is_inside_it(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    assert storage.is_inside(f"{tmp_path}/link/out", f"{tmp_path}/photos")


def test_an_unknown_protocol_is_refused_with_the_uri():
    with pytest.raises(ValueError, match="nosuch://bucket/x"):
        storage.filesystem("nosuch://bucket/x")


@pytest.fixture(params=["local", "memory", "s3"])
def root(request, tmp_path):
    """A place of its own for a test, on each kind of storage."""
    if request.param == "local":
        return str(tmp_path)
    if request.param == "memory":
        return f"memory://{tmp_path}"
    request.getfixturevalue("s3")
    return f"s3://out/{tmp_path.name}"


def test_what_is_written_is_there_and_read_back(root):
    uri = storage.join(root, "deep/er", "a b ü%20#?.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"two"
    assert storage.list_files(root) == [uri]


def test_storage_that_does_not_answer_is_an_error_and_not_an_absence(tmp_path, monkeypatch):
    def stale(self, path, **options):
        raise OSError(errno.ESTALE, "Stale file handle", path)

    monkeypatch.setattr(LocalFileSystem, "info", stale)
    monkeypatch.setattr(storage_errors.time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match="Stale file handle"):
        storage.exists(str(tmp_path / "checkpoint.pt"))


def test_files_are_listed_sorted_and_by_suffix(root):
    for name in ("b.parquet", "a/c.parquet", "a/d.json"):
        storage.write_bytes(storage.join(root, name), b"x")
    wanted = [storage.join(root, "a/c.parquet"), storage.join(root, "b.parquet")]
    assert storage.list_files(root, ".parquet") == wanted
    assert storage.list_files(storage.join(root, "none")) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE])
def test_a_local_folder_that_cannot_be_read_is_not_called_empty(tmp_path, monkeypatch, code):
    storage.write_bytes(str(tmp_path / "runs" / "a.parquet"), b"x")
    monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(OSError(code, "no", str(path))))
    monkeypatch.setattr(storage_errors.time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match="no"):
        storage.list_files(str(tmp_path / "runs"))


def test_a_missing_object_is_a_file_not_found(root):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "none"))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_local_write_that_fails_leaves_the_old_file_and_no_partial_one(tmp_path, monkeypatch, step):
    uri = str(tmp_path / "result.json")
    storage.write_bytes(uri, b"old")

    def full_disk(file):
        raise OSError(28, "No space left on device")

    def refuse(source, target):
        raise PermissionError(13, "Permission denied")

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full_disk)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=r"No space left|Permission denied"):
        storage.write_bytes(uri, b"new")
    assert os.listdir(tmp_path) == ["result.json"]
    assert storage.read_bytes(uri) == b"old"


def test_a_local_version_is_read_and_refused_once_changed(tmp_path):
    photo = tmp_path / "100% a.jpg"
    photo.write_bytes(b"one")
    etag = storage.local_etag(photo.stat())
    assert storage.read_version(str(photo), etag) == b"one"
    os.utime(photo, ns=(0, photo.stat().st_mtime_ns + 1))  # of the same size, saved a moment later
    with pytest.raises(storage.ChangedError, match=r"100% a\.jpg"):
        storage.read_version(str(photo), etag)


def test_a_local_file_that_is_written_while_it_is_read_is_changed(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"as it was listed")
    etag = storage.local_etag(path.stat())
    look = os.fstat

    def look_and_write(number):
        status = look(number)
        path.write_bytes(b"as it is now, with more bytes")
        return status

    monkeypatch.setattr(storage.os, "fstat", look_and_write)
    with pytest.raises(ChangedError, match="changed while it was read"):
        storage.read_version(str(path), etag)


def test_a_version_elsewhere_is_read_and_refused_once_changed(tmp_path):
    uri = f"memory://{tmp_path}/a.jpg"
    storage.write_bytes(uri, b"one")
    fs, path = storage.filesystem(uri)
    etag = storage.info_etag(fs.info(path))
    assert storage.read_version(uri, etag) == b"one"
    storage.write_bytes(uri, b"other")
    with pytest.raises(storage.ChangedError):
        storage.read_version(uri, etag)


def s3_object(name, data=b"photo"):
    """Put an object; return its URI and etag."""
    uri = f"s3://photos/storage/{name}"
    storage.write_bytes(uri, data)
    fs, path = storage.filesystem(uri)
    return uri, storage.info_etag(fs.info(path))


@pytest.mark.parametrize("name", ["a.jpg", "a b+ü#?%20&'\".jpg", "twice//a.jpg", "a\nb.jpg"])
def test_an_s3_version_is_read_whatever_its_key(s3, name):
    uri, etag = s3_object(name, b"the bytes")
    assert storage.read_version(uri, etag) == b"the bytes"


def test_s3_itself_refuses_another_version(s3):
    uri, etag = s3_object("changed.jpg", b"one")
    s3_object("changed.jpg", b"two")
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its class is looked at below
        storage.read_version(uri, etag)
    assert classify(caught.value) == "changed"


def test_an_s3_object_that_is_gone_is_missing(s3):
    with pytest.raises(FileNotFoundError) as caught:
        storage.read_version("s3://photos/storage/gone.jpg", "0" * 32)
    assert classify(caught.value) == "missing"


def test_a_wrong_secret_is_denied(s3, monkeypatch):
    uri, etag = s3_object("secret.jpg")
    stranger = S3FileSystem(
        key=s3.access_key, secret="wrong", endpoint_url=s3.endpoint_url, skip_instance_cache=True
    )
    monkeypatch.setattr(storage, "filesystem", lambda uri: (stranger, uri.removeprefix("s3://")))
    with pytest.raises(PermissionError) as caught:
        storage.read_version(uri, etag)
    assert classify(caught.value) == "denied"
