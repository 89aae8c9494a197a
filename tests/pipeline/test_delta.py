"""Where the table's engine finds S3, and how long it waits."""

import os
import re
import socket

import pytest
from deltalake import DeltaTable

from pipeline.delta import storage_options
from pipeline.storage_errors import redacted


@pytest.fixture
def no_aws(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    return monkeypatch


def test_options_are_for_s3_alone(no_aws):
    no_aws.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    assert storage_options("/out/table") == {}
    assert storage_options("memory://out/table") == {}


def places(options):
    """The options that say where, not how long."""
    return {name: value for name, value in options.items() if name.startswith("AWS_")}


def test_options_come_from_the_environment_and_the_profile_without_keys(no_aws, tmp_path):
    no_aws.setenv("AWS_ACCESS_KEY_ID", "an id")
    no_aws.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    bounds = {"connect_timeout", "timeout", "retry_timeout", "max_retries"}
    assert places(storage_options("s3://out/table")) == {"AWS_REGION": "us-east-1"}
    assert bounds < set(storage_options("s3://out/table"))
    (tmp_path / "config").write_text("[default]\nregion = eu-central-1\n[profile mine]\nregion = sa-east-1\n")
    no_aws.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert places(storage_options("s3://out/table")) == {"AWS_REGION": "eu-central-1"}
    no_aws.setenv("AWS_PROFILE", "mine")
    assert places(storage_options("s3://out/table")) == {"AWS_REGION": "sa-east-1"}
    with (tmp_path / "config").open("a") as config:
        config.write("endpoint_url = https://s3.of-the-profile\n")
    assert places(storage_options("s3://out/table")) == {
        "AWS_REGION": "sa-east-1",
        "AWS_ENDPOINT_URL": "https://s3.of-the-profile",
    }
    no_aws.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    no_aws.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    assert places(storage_options("s3://out/table")) == {
        "AWS_REGION": "eu-west-1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9000",
        "AWS_ALLOW_HTTP": "true",
    }
    no_aws.setenv("AWS_REGION", "eu-west-2")
    no_aws.setenv("AWS_ENDPOINT_URL_S3", "https://s3.example")  # the more special one wins
    assert places(storage_options("s3://out/table")) == {
        "AWS_REGION": "eu-west-2",
        "AWS_ENDPOINT_URL": "https://s3.example",
    }


def test_an_engine_that_gets_no_answer_gives_up(no_aws):
    """The names of deltalake's own bounds: one that it does not know, it ignores."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        no_aws.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        no_aws.setenv("AWS_ACCESS_KEY_ID", "an id")
        no_aws.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
        options = storage_options("s3://out/table")
        assert options["timeout"] == options["retry_timeout"] == "60s"
        short = {"timeout": "200ms", "retry_timeout": "30s", "max_retries": "1"}
        with pytest.raises(OSError, match="timed out") as caught:
            DeltaTable("s3://out/table", storage_options=options | short)
    assert re.search("max_retries .*1, retry_timeout .*30s", redacted(str(caught.value)))
