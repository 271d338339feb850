"""Streams in batches, and how many tiny documents a batch may hold."""

import pytest

from data_prep import dedup_sketch, unit_work
from data_prep.batches import in_batches
from data_prep.dedup_sketch import SketchJob, sketch_unit
from data_prep.documents import ReadOptions, ReadReport, plan_units
from data_prep.handling import Handling
from data_prep.unit_work import UnitJob, build_unit
from data_prep.word_encoding import BulkEncoder

BATCH_CHARACTERS = 6_600


def test_batches_are_whole_and_in_order():
    assert list(in_batches([3, 1, 9, 1, 1], int, 4)) == [[3, 1], [9], [1, 1]]
    assert list(in_batches([2, 2], int, 4)) == [[2, 2]]
    assert list(in_batches([], int, 4)) == []


@pytest.mark.parametrize("work", ["build", "dedup"])
def test_tiny_documents_fill_a_batch_as_their_memory_does(
    tiny_tokenizer, tmp_path, monkeypatch, work
):
    source = tmp_path / "tiny.jsonl"
    source.write_text('{"text": "ka"}\n' * 250)
    (unit,) = plan_units([str(source)], ReadOptions(), report=ReadReport())
    sizes = []

    def count(owner, name):
        real = getattr(owner, name)

        def counted(*words):
            sizes.append(len(words[-1]))
            return real(*words)

        monkeypatch.setattr(owner, name, counted)

    if work == "build":
        monkeypatch.setattr(unit_work, "BATCH_CHARACTERS", BATCH_CHARACTERS)
        count(BulkEncoder, "encode")
        build_unit(UnitJob(tmp_path, tiny_tokenizer, Handling(), 0.0, 2**27), unit)
    else:
        monkeypatch.setattr(dedup_sketch, "_BATCH_CHARACTERS", BATCH_CHARACTERS)
        count(dedup_sketch, "hash_texts")
        sketch_unit(SketchJob(tmp_path, Handling(), None, False), unit)
    assert sizes == [100, 100, 50]
