"""What was measured of ONNX graphs holds what is said of them."""

import json
from pathlib import Path

import pytest

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks/results").glob("onnx-*/scores.json"))


def test_there_are_results():
    assert [path.parent.name for path in RESULTS] == ["onnx-trec6"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_graphs_score_as_torch_does(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["test_examples"] == 551
    assert result["seeds"]
    for seed in result["seeds"]:
        fp32, int8 = seed["graphs"]["figures"]
        assert seed["graphs"]["sequences"] == 201
        assert fp32["max_difference"] <= 1e-4
        assert (fp32["file"], int8["file"]) == ("model.onnx", "model_int8.onnx")
        accuracy = seed["accuracy"]
        assert accuracy["torch"] > 0.5, "a classifier that has learned something"
        assert seed["agreement"]["onnx_fp32"] == 1.0
        assert accuracy["onnx_fp32"] == accuracy["torch"]
        assert abs(accuracy["onnx_int8"] - accuracy["torch"]) <= 0.01
