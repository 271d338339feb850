"""From what runs wrote to tables, comparison.md and comparison.png."""

import dataclasses
import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline.banner import parameter_counts
from pipeline.compare.comparison import Comparison, SystemResult
from pipeline.compare.figures import CurvePoint, RunRows, Spread, curve, read_rows, spreads
from pipeline.compare.matching import Cost, cost_until
from pipeline.compare.plot import draw, plot
from pipeline.compare.report import grids, markdown
from pipeline.compare.runs import Failure
from pipeline.compare.systems import System
from pipeline.config_loading import load_run_config
from pipeline.ds_config import BatchPlan

PLAN = BatchPlan(1, 8, 1, 8)


def test_spreads_are_those_of_a_sample():
    values = [0.5, 0.75, 0.25]
    spread = Spread.of(values)
    assert spread.mean == pytest.approx(np.mean(values))
    assert spread.std == pytest.approx(np.std(values, ddof=1))
    assert str(spread) == "0.5000 +- 0.2500"
    assert str(Spread.of([2.0])) == "2.0000"
    rows = [{"a": 1.0, "b": 2.0}, {"a": 3.0}, {"c": math.nan}]
    assert spreads(rows) == {"a": Spread.of([1.0, 3.0]), "b": Spread(2.0, 0.0, 1)}


def test_rows_of_a_run(tmp_path):
    lines = [
        {"step": 4, "train/mlm_loss": 8.0, "perf/step_seconds": 0.5},
        {"step": 5, "eval/mlm_loss": 7.0, "eval/rtd_auc": 0.5, "other": 1.0},
        {"step": 8, "train/mlm_loss": 6.0, "perf/step_seconds": 0.25},
        {"step": 10, "perf/step_seconds": 1.0},
        {"step": 10, "eval/mlm_loss": 5.0, "eval/rtd_auc": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read_rows(tmp_path, 42)
    assert rows.heldout == {
        5: {"eval/mlm_loss": 7.0, "eval/rtd_auc": 0.5},
        10: {"eval/mlm_loss": 5.0},
    }
    assert rows.training_seconds == pytest.approx(4 * 0.5 + 4 * 0.25 + 2 * 1.0)


def test_curves_have_the_points_of_all_runs():
    system = System("demo", "demo", (), load_run_config("demo"))
    runs = [
        RunRows(1, {100: {"eval/mlm_loss": 6.0}, 300: {"eval/mlm_loss": 5.0}}, 1.0),
        RunRows(2, {100: {"eval/mlm_loss": 7.0}, 200: {}, 300: {"eval/mlm_loss": 5.5}}, 1.0),
    ]
    points = curve(system, runs, PLAN)
    assert [point.cost for point in points] == [
        cost_until(system.config, step, PLAN) for step in (100, 300)
    ]
    assert points[0].figures == {"eval/mlm_loss": Spread.of([6.0, 7.0])}
    assert curve(system, [], PLAN) == []


def test_parameters_are_counted_without_networks():
    from pipeline.modeling.pair import NetworkPair

    for name in ("demo_electra", "demo_mlm"):
        config = load_run_config(name)
        pair = NetworkPair(config)
        assert parameter_counts(config) == {
            network: sum(p.numel() for p in pair.get_submodule(network).parameters())
            for network in config.networks
        }


def point(step, **figures):
    spreads = {f"eval/{name}": Spread(value, 0.1, 2) for name, value in figures.items()}
    return CurvePoint(Cost(step, step * 256, step * 1e9), spreads)


def scored(pretrained):
    return {
        "speaker": {
            "pretrained": {"accuracy": Spread(0.9, 0.0, 2), "f1": Spread(pretrained, 0.01, 2)},
            "random": {"accuracy": Spread(0.9, 0.0, 1), "f1": Spread(0.4, 0.0, 1)},
        }
    }


@pytest.fixture
def result():
    rtd = SystemResult(
        name="demo",
        source="demo",
        words=("run.seed=1",),
        parameters={"generator": 1000, "discriminator": 2345},
        cost=Cost(20, 5120, 2e10),
        seeds=(1, 2),
        training_seconds=Spread(61.0, 1.0, 2),
        curve=(
            point(10, mlm_loss=7.0, rtd_loss=0.5, rtd_auc=0.5),
            point(20, mlm_loss=6.0, rtd_loss=0.4, rtd_auc=0.75),
        ),
        scores=scored(0.625),
        cosines={"E_G": Spread(0.3, 0.0, 2), "E_D": Spread(0.2, 0.0, 2)},
    )
    mlm = dataclasses.replace(
        rtd,
        name="demo_mlm",
        parameters={"generator": 2000},
        curve=(point(40, mlm_loss=5.5),),
        scores=scored(0.5),
        cosines={"E_G": Spread(0.1, 0.0, 2)},
    )
    broken = dataclasses.replace(
        mlm, name="broken", seeds=(), training_seconds=None, curve=(), scores={}, cosines={}
    )
    return Comparison(
        command="deberta compare demo demo_mlm broken",
        match="flops",
        budget=2e10,
        seeds=(1, 2),
        dataset="data",
        dataset_fingerprint="f" * 64,
        environment={
            **{"torch": "2", "deepspeed": "0", "python": "3"},
            **{"device": "cpu", "machine": "x86_64", "threads": "2"},
        },
        finished="2026-01-01T00:00:00+00:00",
        systems=(rtd, mlm, broken),
        baselines={"speaker": {"majority class": {"accuracy": 0.9, "f1": 0.25}}},
        failures=(Failure("broken-seed-1", "ended with 2; the reason"),),
        notes=("A note.",),
    )


def test_tables(result):
    trained, heldout, speaker, cosines = grids(result)
    assert trained.rows[0] == ("demo", "3,345", "20", "5,120", "2.000e+10", "61", "2 of 2")
    assert trained.rows[2][-2:] == ("-", "0 of 2")
    assert heldout.header == ("system", "MLM loss, nats", "RTD loss, nats", "RTD area under ROC")
    assert heldout.rows == (
        ("demo", "6.0000 +- 0.1000", "0.4000 +- 0.1000", "0.7500 +- 0.1000"),
        ("demo_mlm", "5.5000 +- 0.1000", "-", "-"),
        ("broken", "-", "-", "-"),
    )
    assert speaker.title == "Fine-tuned: speaker"
    assert speaker.rows == (
        ("demo", "0.9000 +- 0.0000", "0.9000", "0.6250 +- 0.0100", "0.4000"),
        ("demo_mlm", "0.9000 +- 0.0000", "0.9000", "0.5000 +- 0.0100", "0.4000"),
        ("majority class", "0.9000", "", "0.2500", ""),
    )
    assert cosines.rows[0] == ("demo", "0.3000 +- 0.0000", "0.2000 +- 0.0000", "-")


def test_markdown(result):
    text = markdown(result)
    assert "```\ndeberta compare demo demo_mlm broken\n```" in text
    assert "| demo_mlm | 0.9000 +- 0.0000 | 0.9000 | 0.5000 +- 0.0100 | 0.4000 |" in text
    assert "Matched by flops, 2e+10 a run; seeds 1, 2" in text
    assert "- A note." in text
    assert "## Failed: broken-seed-1\n\n```\nended with 2; the reason\n```" in text
    for grid in grids(result):
        lines = grid.to_markdown().splitlines()
        assert {line.count("|") for line in lines[2:] if line} == {len(grid.header) + 1}
        assert [str(column.header) for column in grid.to_rich().columns] == list(grid.header)


def test_json_holds_every_number(result):
    values = json.loads(json.dumps(result.to_dict()))
    assert values["systems"][0]["curve"][1]["figures"]["eval/rtd_auc"] == {
        "mean": 0.75,
        "std": 0.1,
        "count": 2,
    }
    assert values["systems"][1]["cost"] == {"steps": 20, "tokens": 5120, "flops": 2e10}
    assert values["failures"][0]["run"] == "broken-seed-1"


def test_plot_draws_means_spreads_and_scores(result, tmp_path):
    figure = draw(result)
    assert isinstance(figure, Figure)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == [
        "held-out MLM loss, nats",
        "held-out RTD loss, nats",
        "held-out RTD area under ROC",
        "fine-tuned on speaker: f1 (hollow: random start)",
    ]
    lines = {line.get_label(): line for line in panels["held-out MLM loss, nats"].lines}
    assert list(lines) == ["demo", "demo_mlm"]
    assert lines["demo"].get_xydata().tolist() == [[10e9, 7.0], [20e9, 6.0]]
    band = panels["held-out MLM loss, nats"].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((5.9, 7.1))
    scores = panels["fine-tuned on speaker: f1 (hollow: random start)"]
    drawn = [bars.lines[0].get_ydata().item() for bars in scores.containers]
    assert drawn == [0.625, 0.4, 0.5, 0.4]
    assert [label.get_text() for label in scores.get_xticklabels()] == [
        "demo\n2.00e+10 FLOPs",
        "demo_mlm\n2.00e+10 FLOPs",
    ]
    plot(result, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
