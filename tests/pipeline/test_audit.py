import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bdnet.card import Card
from pipeline import audit, storage
from pipeline.audit import AuditSettings, _remove_lists, audit_digest
from pipeline.layout import AuditLayout
from pipeline.listing import Listing

CARD = Card("bdnet-resnet18", "abc", ranges={"first": 1.0, "second": 2.0})


@pytest.mark.parametrize(
    "other",
    [
        replace(CARD, digest="abd"),
        replace(CARD, temperature=1.5),
        replace(CARD, ranges={}),
        replace(CARD, ranges={"first": 1.0, "second": 2.5}),
    ],
    ids=["weights", "temperature", "no int8", "other ranges for int8"],
)
def test_what_changes_scores_makes_another_audit(other: Card) -> None:
    assert audit_digest(other, 640) != audit_digest(CARD, 640)
    assert audit_digest(CARD, 480) != audit_digest(CARD, 640)


def test_what_a_card_says_beside_that_does_not() -> None:
    told = replace(CARD, scores={"test": 1}, ranges={"second": 2.0, "first": 1.0})
    assert audit_digest(told, 640) == audit_digest(CARD, 640)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder_version", lambda: "another"),
        ("PREPROCESSING_VERSION", "another"),
        ("ARCH_VERSIONS", {"bdnet-resnet18": "another"}),
    ],
)
def test_another_decoder_preprocessing_or_network_is_another_audit(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = audit_digest(CARD, 640)
    monkeypatch.setattr(f"pipeline.audit.{name}", value)
    assert audit_digest(CARD, 640) != before


@pytest.mark.parametrize(("gone", "had"), [(29, 100), (57, 100), (1, 3), (1, 10_000_000), (7, 7)])
def test_the_max_lost_that_a_refusal_asks_for_is_enough(
    gone: int, had: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "previous_listing", lambda *_: ["shard"])
    monkeypatch.setattr(audit, "lost", lambda *_: (gone, had))
    found = Listing(photos=had - gone, shards=[], complete=True, skipped_by_suffix={})
    settings = AuditSettings(
        source="/archive",
        out=str(tmp_path),
        model="bdnet-topdown",
        working_size=None,
        masks=True,
        limit=None,
        workers=None,
        max_denied=0.5,
        max_lost=0.0,
    )
    with pytest.raises(OSError, match="are gone") as refused:
        audit._check_lost(found, AuditLayout(str(tmp_path)), settings)
    asked = re.search(r"--max-lost ([\d.]+);", str(refused.value))
    assert asked
    audit._check_lost(found, AuditLayout(str(tmp_path)), replace(settings, max_lost=float(asked[1])))


def test_lists_that_cannot_be_removed_do_not_fail_an_audit_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(uri: str) -> None:
        raise PermissionError(13, "no right to delete", uri)

    monkeypatch.setattr(storage, "remove_folder", refuse)
    with caplog.at_level(logging.WARNING):
        _remove_lists(str(tmp_path), AuditLayout(str(tmp_path)).run("this"))
    assert "no right to delete" in caplog.text
