"""Listings of folders, of other file systems, of manifests, and of a real S3 bucket."""

import errno
import os
import resource
import shutil
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import ClientPayloadError
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer

from pipeline import listing, storage, storage_errors
from pipeline.fetch import fetch
from pipeline.listing import read_listing, write_listing
from pipeline.schema import LISTING

ODD_NAMES = [
    "ünï côdé 写真.jpg",
    "two\nlines.jpg",
    'it\'s "quoted".jpg',
    "100% #1?.jpg",
    " lead.jpg",
    "a\\b.jpg",
]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


def listed(source, out, **options):
    """The listing and its rows, all shards together."""
    found = write_listing(str(source), str(out / "listing"), **options)
    return found, [row for shard in found.shards for row in read_listing(shard).to_pylist()]


def put(folder, *names, data=b"x"):
    for name in names:
        path = os.path.join(os.fsencode(folder), name if isinstance(name, bytes) else name.encode())
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)


def test_a_row_says_where_which_version_how_large_and_when(photos, tmp_path):
    put(photos, "a.jpg", data=b"12345")
    os.utime(photos / "a.jpg", (1_700_000_000, 1_700_000_000))
    found, rows = listed(photos, tmp_path)
    assert rows == [
        {
            "uri": f"{photos}/a.jpg",
            "etag": "5-1700000000000000000",
            "size_bytes": 5,
            "modified_at": datetime.fromtimestamp(1_700_000_000, UTC),
        }
    ]
    assert pq.read_schema(found.shards[0]) == LISTING
    assert (found.photos, found.complete, found.skipped_by_suffix) == (1, True, {})


def test_photos_are_known_by_suffix_in_any_case_and_the_rest_is_counted(photos, tmp_path):
    put(photos, "a.JPG", "b.Jpeg", "c.heic", "d.tiff", "a.xml", "sub/B.XML", "Makefile", ".jpg", "v1.0/notes")
    found, rows = listed(photos, tmp_path)
    assert [os.path.basename(row["uri"]) for row in rows] == ["a.JPG", "b.Jpeg", "c.heic", "d.tiff"]
    assert found.skipped_by_suffix == {".xml": 2, "(none)": 3}


def test_folders_below_are_listed_in_a_steady_order(photos, tmp_path):
    put(photos, "z.jpg", "b/2.jpg", "a/1.jpg", "a/0/x.jpg")
    _, rows = listed(photos, tmp_path)
    assert [row["uri"].removeprefix(f"{photos}/") for row in rows] == [
        "z.jpg",
        "a/1.jpg",
        "a/0/x.jpg",
        "b/2.jpg",
    ]


def test_an_s3_server_that_tells_no_etag_is_refused(s3, tmp_path, monkeypatch):
    fs, _ = storage.filesystem("s3://photos")
    page = {"Contents": [{"Key": "bare/a.jpg", "Size": 1, "LastModified": datetime.now(UTC)}]}
    monkeypatch.setattr(fs, "call_s3", lambda method, **arguments: page)
    with pytest.raises(ValueError, match=r"s3://photos/bare/a\.jpg: its server tells no etag"):
        listed("s3://photos/bare", tmp_path)


def test_folders_may_lie_in_each_other_deeper_than_python_calls_itself(photos, tmp_path):
    here = os.open(photos, os.O_RDONLY)
    for _ in range(1_100):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(os.open("a.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    _, [row] = listed(photos, tmp_path)
    assert row["uri"].endswith("/d/d/a.jpg")
    # pytest's own way to remove folders is recursive.
    subprocess.run(["rm", "-rf", photos / "d"], check=True)


def test_odd_names_survive_and_can_be_read_back(photos, tmp_path):
    put(photos, *ODD_NAMES)
    _, rows = listed(photos, tmp_path)
    assert sorted(row["uri"] for row in rows) == sorted(f"{photos}/{name}" for name in ODD_NAMES)
    assert {storage.read_version(row["uri"], row["etag"]) for row in rows} == {b"x"}


def test_a_name_that_is_no_utf8_becomes_a_file_uri_that_can_be_read(photos, tmp_path):
    put(photos, b"caf\xe9 100%.JPG", data=b"latin")
    _, [row] = listed(photos, tmp_path)
    assert row["uri"] == f"file://{photos}/caf%E9%20100%25.JPG"
    assert storage.read_version(row["uri"], row["etag"]) == b"latin"


def test_links_to_photos_are_photos_but_no_link_traps_or_stops_the_walk(photos, tmp_path):
    put(photos, "real.jpg", "sub/b.jpg")
    (photos / "link.jpg").symlink_to(photos / "real.jpg")
    (photos / "dangling.jpg").symlink_to(photos / "gone.jpg")
    (photos / "dangling in a file.jpg").symlink_to(photos / "real.jpg" / "x.jpg")
    (photos / "itself.jpg").symlink_to(photos / "itself.jpg")
    (photos / "nowhere.jpg").symlink_to("x" * 300)
    (photos / "sub" / "up").symlink_to(photos)
    os.mkfifo(photos / "pipe.jpg")  # to open it would wait for ever
    found, rows = listed(photos, tmp_path)
    assert [row["uri"].removeprefix(f"{photos}/") for row in rows] == ["link.jpg", "real.jpg", "sub/b.jpg"]
    assert found.skipped_by_suffix == {"(linked folder)": 1}


def test_a_link_to_what_may_not_be_seen_is_a_photo_that_is_denied_until_it_may(photos, tmp_path, monkeypatch):
    put(photos, "closed/real.jpg", "b.jpg")
    (photos / "a.jpg").symlink_to(photos / "closed" / "real.jpg")
    (photos / "folder").symlink_to(photos / "closed" / "folder")
    see = os.stat

    def stat(path, **options):
        if os.path.islink(path):  # root may see everything
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return see(path, **options)

    with monkeypatch.context() as closed:
        closed.setattr(listing.os, "stat", stat)
        found, rows = listed(photos, tmp_path / "closed")
    assert [row["uri"] for row in rows] == [
        f"{photos}/a.jpg",
        f"{photos}/b.jpg",
        f"{photos}/closed/real.jpg",
    ]
    assert found.skipped_by_suffix == {"(linked folder)": 1}
    _, [seen, *_] = listed(photos, tmp_path / "open")
    assert seen["uri"] == rows[0]["uri"]
    assert seen["etag"] != rows[0]["etag"]


def test_a_folder_that_goes_while_the_archive_is_listed_is_no_error(photos, tmp_path, monkeypatch):
    put(photos, "a/1.jpg", "b/2.jpg", "c/3.jpg")
    listdir = os.listdir

    def list_and_remove(folder):
        names = listdir(folder)
        shutil.rmtree(photos / "b", ignore_errors=True)
        return names

    monkeypatch.setattr(listing.os, "listdir", list_and_remove)
    _, rows = listed(photos, tmp_path)
    assert [row["uri"].removeprefix(f"{photos}/") for row in rows] == ["a/1.jpg", "c/3.jpg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any folder")
def test_a_folder_that_may_not_be_read_stops_the_listing(photos, tmp_path):
    put(photos, "a.jpg", "closed/b.jpg")
    (photos / "closed").chmod(0)
    try:
        with pytest.raises(PermissionError):
            listed(photos, tmp_path)
    finally:
        (photos / "closed").chmod(0o700)


@pytest.mark.parametrize(
    ("limit", "photos_listed", "complete"),
    [(None, 3, True), (1, 1, False), (2, 2, False), (3, 3, True), (4, 3, True)],
)
def test_a_limit_makes_a_listing_incomplete_only_where_more_remained(
    photos, tmp_path, limit, photos_listed, complete
):
    put(photos, "a.jpg", "b.jpg", "c.jpg", "z.xml")
    found, rows = listed(photos, tmp_path, limit=limit)
    assert (found.photos, len(rows), found.complete) == (photos_listed, photos_listed, complete)


def test_a_shard_is_written_whenever_it_is_full(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "ROWS_PER_SHARD", 2)
    put(photos, *(f"{n}.jpg" for n in range(5)))
    found, rows = listed(photos, tmp_path)
    assert [read_listing(shard).num_rows for shard in found.shards] == [2, 2, 1]
    assert storage.list_files(str(tmp_path / "listing")) == list(found.shards)
    assert len({row["uri"] for row in rows}) == 5


def test_an_archive_of_nothing_but_other_files_is_listed_as_empty(photos, tmp_path):
    put(photos, "a.txt")
    found, rows = listed(photos, tmp_path)
    assert (found.photos, rows, found.complete, found.skipped_by_suffix) == (0, [], True, {".txt": 1})
    assert read_listing(found.shards[0]).schema == LISTING


@pytest.mark.parametrize("source", ["empty", "gone", "memory://nothing/here"])
def test_an_empty_source_is_an_error_that_names_it_and_writes_nothing(tmp_path, source):
    (tmp_path / "empty").mkdir()
    source = source if "://" in source else str(tmp_path / source)
    with pytest.raises(ValueError, match=source):
        listed(source, tmp_path)
    assert not (tmp_path / "listing").exists()


def test_any_other_file_system_is_listed_and_read(tmp_path):
    root = f"memory://{tmp_path}"
    for name in ("a.jpg", "sub/b c.png", "notes.txt"):
        storage.write_bytes(f"{root}/{name}", name.encode())
    found, rows = listed(root, tmp_path)
    read = {storage.read_version(row["uri"], row["etag"]) for row in rows}
    assert read == {b"a.jpg", b"sub/b c.png"}
    assert found.skipped_by_suffix == {".txt": 1}


def manifest(path, rows, schema=LISTING):
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def test_a_manifest_is_a_source(tmp_path):
    when = datetime(2026, 1, 1, tzinfo=UTC)
    rows = [
        {"uri": f"s3://photos/{n}.jpg", "etag": f"e{n}", "size_bytes": n, "modified_at": when}
        for n in range(3)
    ]
    note = {**rows[0], "uri": "s3://photos/note.txt"}
    found, read = listed(manifest(tmp_path / "manifest.parquet", [*rows, note]), tmp_path)
    assert read == rows
    assert found.skipped_by_suffix == {".txt": 1}


def test_a_manifest_without_a_column_names_it(tmp_path):
    path = manifest(tmp_path / "manifest.parquet", [{"uri": "a.jpg"}], pa.schema([("uri", pa.string())]))
    with pytest.raises(ValueError, match=r"manifest\.parquet: column etag is missing"):
        listed(path, tmp_path)


def test_an_s3_prefix_is_listed_over_pages_without_folder_keys_and_siblings(s3, tmp_path, monkeypatch):
    fs, _ = storage.filesystem("s3://photos")
    asked = []

    def in_small_pages(method, **arguments):
        asked.append(method)
        return type(fs).call_s3(fs, method, **arguments, MaxKeys=4)

    names = {*(f"{n}.jpg" for n in range(8)), *(f"sub/{name}" for name in ODD_NAMES if "\\" not in name)}
    # Some writers leave an empty key for a folder.
    for key in [*names, "sub/", "notes.txt"]:
        fs.call_s3("put_object", Bucket="photos", Key=f"listing/{key}", Body=b"x")
    fs.pipe_file("photos/listing2/other.jpg", b"a prefix that begins alike")
    monkeypatch.setattr(fs, "call_s3", in_small_pages)
    found, rows = listed("s3://photos/listing", tmp_path)
    assert asked == ["list_objects_v2"] * 4
    assert {row["uri"].removeprefix("s3://photos/listing/") for row in rows} == names
    assert len(rows) == found.photos == len(names)
    assert found.skipped_by_suffix == {".txt": 1}
    assert {row["size_bytes"] for row in rows} == {1}
    assert datetime.now(UTC) - max(row["modified_at"] for row in rows) < timedelta(minutes=5)
    for row in rows:
        assert storage.read_version(row["uri"], row["etag"]) == b"x"


def test_a_page_that_fails_is_asked_for_again_and_one_that_stays_refused_ends_the_listing(
    s3, tmp_path, monkeypatch
):
    monkeypatch.setattr(storage_errors.time, "sleep", lambda seconds: None)
    fs, _ = storage.filesystem("s3://photos")
    fs.pipe({f"photos/pages/{n}.jpg": b"x" for n in range(6)})
    errors = []

    def sometimes(method, **arguments):
        if "ContinuationToken" in arguments and errors:
            raise errors.pop(0)
        return type(fs).call_s3(fs, method, **arguments, MaxKeys=4)

    monkeypatch.setattr(fs, "call_s3", sometimes)
    errors += [ConnectionResetError(104, "reset"), TimeoutError()]
    assert listed("s3://photos/pages", tmp_path)[0].photos == 6
    errors += [PermissionError("no")]
    with pytest.raises(PermissionError, match="s3://photos/pages: no"):
        listed("s3://photos/pages", tmp_path)


def test_a_folder_that_a_file_system_cannot_list_is_never_left_out(tmp_path, monkeypatch):
    root = f"memory://{tmp_path}"
    for name in ("a.jpg", "closed/b.jpg"):
        storage.write_bytes(f"{root}/{name}", b"x")
    fs, _ = storage.filesystem(root)
    read = fs.ls

    def ls(folder, *arguments, **options):
        if folder.endswith("closed"):
            raise PermissionError("closed")
        return read(folder, *arguments, **options)

    monkeypatch.setattr(fs, "ls", ls)
    with pytest.raises(PermissionError, match=f"{root}/closed: closed"):
        listed(root, tmp_path)


def test_a_file_systems_own_kind_of_error_names_the_source(tmp_path, monkeypatch):
    fs, _ = storage.filesystem("memory://")

    def ls(*arguments, **options):
        raise ClientPayloadError("the connection broke")

    monkeypatch.setattr(fs, "ls", ls)
    monkeypatch.setattr(storage_errors.time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match="memory:///somewhere: the connection broke"):
        listed("memory://somewhere", tmp_path)


class Web(SimpleHTTPRequestHandler):
    tells_time = True
    refused = HTTPStatus.OK  # what is said to who asks for b.jpg

    def log_message(self, *arguments):
        pass

    def send_head(self):
        if self.refused == HTTPStatus.OK or not self.path.endswith("/b.jpg"):
            return super().send_head()
        self.send_error(self.refused)
        return None

    def send_header(self, keyword, value):
        if self.tells_time or keyword != "Last-Modified":
            super().send_header(keyword, value)


@pytest.fixture
def web(photos):
    """The address of a web server of the photos."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Web, directory=str(photos))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_web_server_is_a_source_and_its_time_of_change_tells_versions(photos, web, tmp_path):
    put(photos, "a.jpg", "sub/b.jpg")
    for row in listed(web, tmp_path)[1]:
        assert storage.read_version(row["uri"], row["etag"]) == b"x"
    os.utime(photos / "a.jpg", (1_700_000_000, 1_700_000_000))
    assert len({row["etag"] for row in listed(web, tmp_path)[1]}) == 2


def test_a_photo_that_a_web_server_keeps_back_for_now_ends_the_listing_and_is_not_called_gone(
    photos, web, tmp_path, monkeypatch
):
    put(photos, "a.jpg", "b.jpg")
    monkeypatch.setattr(storage_errors, "BACKOFF_SECONDS", 0)
    monkeypatch.setattr(Web, "refused", HTTPStatus.SERVICE_UNAVAILABLE)
    with pytest.raises(OSError, match=r"b\.jpg: .*503"):
        listed(web, tmp_path)


def test_a_photo_that_a_web_server_denies_is_listed_and_denied_when_it_is_read(
    photos, web, tmp_path, monkeypatch
):
    put(photos, "a.jpg", "b.jpg")
    monkeypatch.setattr(Web, "refused", HTTPStatus.FORBIDDEN)
    _, rows = listed(web, tmp_path / "denied")
    assert [row["uri"].removeprefix(web) for row in rows] == ["a.jpg", "b.jpg"]
    assert fetch(rows[1]["uri"], rows[1]["etag"], 10).status == "denied"
    monkeypatch.setattr(Web, "refused", HTTPStatus.OK)
    assert listed(web, tmp_path / "open")[1][1]["etag"] != rows[1]["etag"]


def test_a_page_writes_names_as_html(photos, web, tmp_path):
    put(photos, "R&D 'one'.jpg", "a.jpg")
    _, rows = listed(web, tmp_path)
    assert [row["uri"].removeprefix(web) for row in rows] == ["R%26D%20%27one%27.jpg", "a.jpg"]
    (photos / "index.html").write_text('<a href="R&amp;D%20&#x27;one&#x27;.jpg">R&amp;D</a>')
    _, [row] = listed(web, tmp_path / "as Apache")
    assert storage.read_version(row["uri"], row["etag"]) == b"x"


def test_links_of_a_page_that_lead_away_from_its_folder_are_not_followed(photos, web, tmp_path):
    put(photos, "in/a.jpg", "in/sub/b.jpg", "in/notes.txt", "out.jpg")
    links = ("./", "../", "../../", "?C=N;O=D", "#top", "/out.jpg", "a.jpg", "sub/", "notes.txt", "dead.jpg")
    (photos / "in/index.html").write_text("".join(f'<a href="{link}">{link}</a>\n' for link in links))
    found, rows = listed(f"{web}in/", tmp_path)
    assert [row["uri"].removeprefix(web) for row in rows] == ["in/a.jpg", "in/sub/b.jpg"]
    assert found.skipped_by_suffix == {".txt": 1}


@pytest.fixture
def ftp(photos):
    """The address of an FTP server of the photos, which anybody may read."""

    class Handler(FTPHandler):
        authorizer = DummyAuthorizer()

        def ftp_MLSD(self, path):
            self.respond("550 no.") if path.endswith("closed") else super().ftp_MLSD(path)

        def ftp_LIST(self, path):
            self.respond("550 no.") if path.endswith("closed") else super().ftp_LIST(path)

    Handler.authorizer.add_anonymous(str(photos))
    server = FTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"ftp://127.0.0.1:{server.address[1]}"
    server.close_all()


def test_a_server_named_in_the_uri_is_a_source_and_its_photos_keep_its_name(photos, ftp, tmp_path):
    put(photos, "2024/a.jpg", "2024/sub/b.jpg", "c.jpg")
    _, rows = listed(f"{ftp}/2024", tmp_path)
    assert [row["uri"] for row in rows] == [f"{ftp}/2024/a.jpg", f"{ftp}/2024/sub/b.jpg"]
    assert [row["uri"] for row in listed(ftp, tmp_path)[1]] == [
        f"{ftp}/c.jpg",
        f"{ftp}/2024/a.jpg",
        f"{ftp}/2024/sub/b.jpg",
    ]
    for row in rows:
        assert storage.read_version(row["uri"], row["etag"]) == b"x"
    put(photos, "2024/a.jpg", data=b"another")
    with pytest.raises(storage_errors.ChangedError):
        storage.read_version(rows[0]["uri"], rows[0]["etag"])


def test_a_folder_that_an_ftp_server_does_not_list_is_not_called_empty(photos, ftp, tmp_path, monkeypatch):
    monkeypatch.setattr(storage_errors, "BACKOFF_SECONDS", 0)
    put(photos, "some/a.jpg", "some/closed/b.jpg")
    (photos / "some" / "empty").mkdir()
    with pytest.raises(OSError, match="some/closed: 550 no"):
        listed(f"{ftp}/some", tmp_path)


def test_a_server_that_is_not_there_is_an_error_of_storage(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_errors, "BACKOFF_SECONDS", 0)
    with pytest.raises(OSError, match=r"ftp://127\.0\.0\.1:9/photos"):
        listed("ftp://127.0.0.1:9/photos", tmp_path)


def test_a_server_that_tells_no_versions_is_refused(photos, web, tmp_path, monkeypatch):
    put(photos, "a.jpg")
    monkeypatch.setattr(Web, "tells_time", False)
    with pytest.raises(ValueError, match=r"a\.jpg: its server tells no etag and no time of change"):
        listed(web, tmp_path)


def test_an_empty_s3_prefix_and_an_unknown_bucket_are_errors(s3, tmp_path):
    with pytest.raises(ValueError, match="s3://photos/no/such"):
        listed("s3://photos/no/such", tmp_path)
    with pytest.raises(FileNotFoundError):
        listed("s3://no-such-bucket/x", tmp_path)


def test_a_manifest_line_that_stands_twice_is_one_photo_and_an_empty_one_is_refused(tmp_path):
    row = {"uri": "/photos/a.jpg", "etag": "1", "size_bytes": 1, "modified_at": None}
    manifest = tmp_path / "manifest.parquet"
    pq.write_table(pa.Table.from_pylist([row, row, {**row, "etag": "2"}], schema=LISTING), manifest)
    assert write_listing(str(manifest), str(tmp_path / "listing")).photos == 2
    pq.write_table(pa.Table.from_pylist([{**row, "size_bytes": -1}], schema=LISTING), manifest)
    with pytest.raises(ValueError, match=r"a\.jpg is no size"):
        write_listing(str(manifest), str(tmp_path / "listing"))
    pq.write_table(pa.Table.from_pylist([{**row, "etag": "1\n2"}], schema=LISTING), manifest)
    with pytest.raises(ValueError, match=r"the etag of /photos/a\.jpg is none"):
        write_listing(str(manifest), str(tmp_path / "listing"))
    nameless = pa.table({"uri": pa.array([None], pa.string()), "etag": ["1"], "size_bytes": [1]})
    pq.write_table(
        nameless.append_column("modified_at", pa.nulls(1, LISTING.field("modified_at").type)), manifest
    )
    with pytest.raises(ValueError, match="a row lacks uri, etag or size_bytes"):
        write_listing(str(manifest), str(tmp_path / "listing"))


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("etag", pa.array([7]), "column etag is int64; make it a string"),
        ("size_bytes", pa.array(["12"]), "column size_bytes is string; make it an integer"),
        ("size_bytes", pa.array([5.5]), "column size_bytes is double; make it an integer"),
        ("modified_at", pa.array(["2026-01-01"]), "column modified_at is string; make it a timestamp"),
        ("modified_at", pa.array([1_700_000_000]), "column modified_at is int64; make it a timestamp"),
    ],
)
def test_a_manifest_whose_column_has_another_type_is_refused(tmp_path, column, values, said):
    row = {"uri": "/photos/a.jpg", "etag": "1", "size_bytes": 1, "modified_at": None}
    rows = pa.Table.from_pylist([row], schema=LISTING)
    pq.write_table(
        rows.set_column(rows.schema.get_field_index(column), column, values), tmp_path / "m.parquet"
    )
    with pytest.raises(ValueError, match=f"m.parquet: {said}"):
        listed(tmp_path / "m.parquet", tmp_path)


def test_a_manifest_may_hold_categories_as_pandas_writes_them(tmp_path):
    row = {"uri": "/photos/a.jpg", "etag": "1", "size_bytes": 1, "modified_at": None}
    rows = pa.Table.from_pylist([row], schema=LISTING)
    rows = rows.set_column(1, "etag", rows["etag"].dictionary_encode())
    pq.write_table(rows.set_column(3, "modified_at", pa.nulls(1)), tmp_path / "m.parquet")
    assert listed(tmp_path / "m.parquet", tmp_path)[1] == [row]


def test_a_disk_too_full_for_what_a_manifest_has_listed_is_said_with_a_remedy(tmp_path, monkeypatch):
    rows = [{"uri": f"/photos/{n}.jpg", "etag": "1", "size_bytes": 1} for n in range(4_000)]
    source = manifest(tmp_path / "manifest.parquet", rows)
    monkeypatch.setattr(listing, "SEEN_CACHE_KIB", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, hard))  # as if the disk ended there
    try:
        with pytest.raises(OSError, match="SQLITE_TMPDIR"):
            listed(source, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nosuch://photos/a.jpg", "cannot open nosuch://"),
        ("file://otherhost/a.jpg", "no file of this machine"),
        ("photos/a.jpg", "relative path"),
        ("/photos/\0a.jpg", "NUL"),
        ("s3://KEY:SEKRET@photos/a.jpg", "holds credentials"),
        ("https://host/a.jpg?X-Amz-Signature=SEKRET&name=a.jpg", "holds credentials"),
    ],
)
def test_a_manifest_is_refused_for_a_uri_that_no_worker_can_open(tmp_path, uri, said):
    rows = [{"uri": name, "etag": "1", "size_bytes": 1} for name in ("/photos/b.jpg", uri)]
    with pytest.raises(ValueError, match=f"manifest.parquet: .*{said}") as refused:
        listed(manifest(tmp_path / "manifest.parquet", rows), tmp_path)
    assert "SEKRET" not in str(refused.value)


def test_a_manifests_uris_and_etags_become_those_of_a_listing(tmp_path):
    uris = ["S3a://photos/a:b@c?token=x.jpg", "/photos/b.jpg", "file:///photos/c%e9.jpg"]
    rows = [{"uri": uri, "etag": '"e1"', "size_bytes": 1} for uri in uris]
    _, read = listed(manifest(tmp_path / "manifest.parquet", rows), tmp_path)
    assert [row["uri"] for row in read] == ["s3://photos/a:b@c?token=x.jpg", *uris[1:]]
    assert {row["etag"] for row in read} == {"e1"}


def test_a_time_that_no_calendar_has_is_none():
    assert listing._moment(0.5) == datetime(1970, 1, 1, 0, 0, 0, 500_000, UTC)
    assert listing._moment(1e15) is listing._moment(-1e15) is listing._moment(1e300) is None


def test_a_manifests_times_that_no_calendar_has_are_none(tmp_path):
    times = {"ns": 1_700_000_000_123_456_789, "s": 10**12}
    for unit, time in times.items():
        rows = {"uri": ["/archive/a.jpg"], "etag": ["1"], "size_bytes": [1]}
        table = pa.table(rows | {"modified_at": pa.array([time], pa.timestamp(unit, "UTC"))})
        pq.write_table(table, tmp_path / f"{unit}.parquet", version="2.6", store_schema=True)
    _, [exact] = listed(tmp_path / "ns.parquet", tmp_path / "a")
    assert exact["modified_at"] == datetime(2023, 11, 14, 22, 13, 20, 123_456, UTC)
    _, [absurd] = listed(tmp_path / "s.parquet", tmp_path / "b")
    assert absurd["modified_at"] is None


def test_only_so_many_suffixes_are_counted_by_name(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(listing.COUNTED_SUFFIXES + 7):
        (folder / f"frame.{number:05d}").touch()
    counted = write_listing(str(folder), str(tmp_path / "listing")).skipped_by_suffix
    assert len(counted) == listing.COUNTED_SUFFIXES + 1
    assert counted[listing.OTHERS] == 7


def test_suffixes_that_are_none_are_counted_together(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.\x1b[31mred", "b.averyveryverylongsuffix", "c.xml"):
        (folder / name).touch()
    assert write_listing(str(folder), str(tmp_path / "listing")).skipped_by_suffix == {
        "(other)": 2,
        ".xml": 1,
    }
