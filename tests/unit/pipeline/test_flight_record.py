"""What torch's flight recorder knows, written beside the report of a hang."""

import json
import types

import pytest
import torch

from pipeline.flight_record import collectives_file, write_collectives

ENTRIES = [{"profiling_name": "nccl:all_reduce", "state": "started"}]


@pytest.fixture
def recorder(monkeypatch):
    """Stands for torch's extension module; returns a function that gives it functions."""

    def set_to(**functions):
        monkeypatch.setattr(torch._C, "_distributed_c10d", types.SimpleNamespace(**functions))

    return set_to


def test_a_rank_with_a_gpu_writes_what_torchfrtrace_reads(recorder, tmp_path):
    recorder(
        _dump_fr_trace_json=lambda: b'{"entries": []}',
        _dump_nccl_trace_json=lambda: json.dumps({"entries": ENTRIES}),
        _dump_nccl_trace=lambda: b"a pickle",
    )
    write_collectives(tmp_path, 3)
    assert json.loads(collectives_file(tmp_path, 3).read_text()) == {"nccl": ENTRIES}
    assert (tmp_path / "nccl_trace_rank_3").read_bytes() == b"a pickle"


@pytest.mark.parametrize("answer", [b"no JSON", b"[]", RuntimeError("no device")])
def test_a_recorder_that_fails_costs_no_verdict(recorder, tmp_path, caplog, answer):
    def dump():
        if isinstance(answer, Exception):
            raise answer
        return answer

    recorder(_dump_fr_trace_json=dump)
    write_collectives(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []
    assert "torch's flight recorder" in caplog.text


def test_a_release_without_a_recorder_and_a_folder_that_is_gone(recorder, tmp_path):
    recorder()
    write_collectives(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []
    recorder(_dump_fr_trace_json=lambda: json.dumps({"entries": ENTRIES}))
    write_collectives(tmp_path / "gone", 0)
    assert list(tmp_path.iterdir()) == []
