import pytest

from jobs.audit import Settings, exit_code


@pytest.mark.parametrize(
    ("by_status", "asked", "code"),
    [
        ({"ok": 1, "missing": 1}, True, 3),
        ({"ok": 1, "missing": 1}, False, 0),
        ({"ok": 1, "unreadable": 1}, True, 0),  # has its row and is not tried again
        ({}, True, 0),
    ],
)
def test_who_asks_is_told_by_the_exit_code_of_photos_that_remain_to_be_read(by_status, asked, code):
    settings = Settings("photos", out="out", fail_on_errors=asked)
    assert exit_code(settings, {"by_status": by_status}) == code
