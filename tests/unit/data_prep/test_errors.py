"""Errors for people hold no secret that somebody typed."""

from pathlib import Path

import pytest

from data_prep.errors import CorruptError, DivergedError, UserError
from data_prep.shards import Dataset

PLAIN = "data.path runs/a@b: 3 of 4:5 (see https://example.org/a@b, file:///tmp/x@y)"


@pytest.mark.parametrize("kind", [UserError, CorruptError, DivergedError])
def test_messages_hold_no_credentials(kind):
    assert (
        str(kind("https://alice:hunter2@store/d is no folder"))
        == "https://***@store/d is no folder"
    )
    assert str(kind("s3://token@bucket: no")) == "s3://***@bucket: no"
    assert str(kind(PLAIN)) == PLAIN


def test_a_path_keeps_its_secret_however_it_is_written():
    for path in ("https://alice:hunter2@store/d", Path("https://alice:hunter2@store/d")):
        with pytest.raises(UserError, match="no such dataset folder") as caught:
            Dataset.open(path)
        assert "hunter2" not in str(caught.value)
        assert "***@store/d" in str(caught.value)
