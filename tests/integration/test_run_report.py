"""`deberta report` on real runs: its figures are those of metrics.jsonl, its page opens."""

import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from data_prep.errors import UserError
from data_prep.shards import Dataset
from pipeline.commands_report import report_command
from pipeline.export import export_run, find_commit
from pipeline.export_facts import export_facts
from pipeline.model_card import CURVES, model_card
from pipeline.report.history import read_history
from pipeline.report.page import overview, overview_panels
from pipeline.report.panels import MAX_POINTS, panels_of
from pipeline.run_folder import RunFolder
from tests.browsing import look
from tests.conftest import TINY_RUN
from tests.forked_worlds import train

pytestmark = pytest.mark.distributed

NASTY = '</script><script>document.title = "owned"</script>'
STEPS = 12
# In the colours that people with any colour vision tell apart.
BLUE, VERMILION = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


@pytest.fixture(scope="module")
def made(dataset_folder, tmp_path_factory):
    """Two runs that differ in their seed, a row a step, held-out figures and probes included; the
    second beside the first's losses."""
    folder = tmp_path_factory.mktemp("run-report")
    config, ds = folder / "tiny.toml", folder / "zero1.json"
    vocab_size = Dataset.open(dataset_folder).manifest.vocab_size
    config.write_text(TINY_RUN.format(vocab_size=vocab_size, dropout=0.0))
    batch = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0}
    rest = {"bf16": {"enabled": False}, "zero_optimization": {"stage": 1}}
    ds.write_text(json.dumps({**batch, **rest}))
    pairs = folder / "pairs.jsonl"
    words = ("nation", "people", "year", "world", "war", "peace")
    records = [
        {"sentence_good": f"the {a} of the {b}", "sentence_bad": f"of {a} the the {b}"}
        for a in words
        for b in words
    ]
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = (
        "logging.interval_steps=1",
        f"schedule.max_steps={STEPS}",
        "evaluation.interval_steps=1",
        f"evaluation.minimal_pairs={pairs}",
        "evaluation.minimal_pairs_compute_fraction=0.5",  # the run is tiny
    )
    start = (config, ds, dataset_folder)
    code, _ = train(*start, folder / "one" / "run", *words)
    assert code == 0
    reference = folder / "reference.json"
    invoke(folder / "one" / "run", "--write-reference", reference, "--data", "eight speeches")
    again = (*words, "run.seed=7", f"reference.curve={reference}")
    code, output = train(*start, folder / "two" / "run", *again)
    assert code == 0
    return SimpleNamespace(
        runs=(folder / "one" / "run", folder / "two" / "run"), reference=reference, output=output
    )


def invoke(*words):
    app = typer.Typer()
    app.command()(report_command)
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None:
        raise result.exception
    return result.output


class _Page(HTMLParser):
    """Scripts, their kinds, and what a page would fetch."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.addresses, self._inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.addresses += [values[key] for key in ("src", "href") if key in values]
        if tag == "script":
            self._inside = values.get("type")

    def handle_endtag(self, tag):
        if tag == "script":
            self._inside = None

    def handle_data(self, data):
        if self._inside:
            self.scripts.append((self._inside, data))


def plots_of(page):
    [(kind, data)] = _Page(page.read_text()).scripts
    assert kind == "application/json"
    return {panel["name"]: panel for panel in json.loads(data)}


def test_the_page_shows_what_the_run_wrote(made, tmp_path):
    run = made.runs[0]
    invoke(run, "--output", tmp_path / "out")
    plots = plots_of(tmp_path / "out" / "report.html")
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [line] = plots["mlm-loss"]["lines"]
    assert [(point["x"], point["y"]) for point in line["points"]] == [
        (row["step"], row["train/mlm_loss"]) for row in written if "train/mlm_loss" in row
    ]
    [marks] = plots["mlm-loss"]["marks"]
    assert [point["y"] for point in marks["points"]] == [
        row["eval/mlm_loss"] for row in written if "eval/mlm_loss" in row
    ]
    assert len(marks["points"]) == STEPS
    # Nothing that a run writes is left out.
    shown = sum(len(plot["lines"]) + len(plot["marks"]) for plot in plots.values())
    names = {name for row in written for name in row if name != "step"}
    assert {"eval/minimal_pairs_generator", "eval/minimal_pairs_discriminator"} <= names
    assert shown == len(names)
    for plot in plots.values():
        assert max(len(line["points"]) for line in plot["lines"]) >= 10, plot["name"]
        assert all(np.isfinite(p["y"]) for line in plot["lines"] for p in line["points"])
        assert (tmp_path / "out" / f"{plot['name']}.png").stat().st_size > 5000
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".html", ".png"}


def test_two_runs_lie_over_each_other(made, tmp_path):
    output = invoke(*made.runs, "--output", tmp_path)
    assert "one/run" in output
    assert "two/run" in output
    labels = {
        name: [line["label"] for line in plot["lines"]]
        for name, plot in plots_of(tmp_path / "report.html").items()
    }
    where = "eight speeches"
    assert where not in str(labels)
    [one, two, reference] = labels["mlm-loss"]
    assert (one, two) == ("one/run", "two/run")
    assert reference.startswith("reference: reference, 1 seed, 1 x ")
    assert labels["rtd-accuracy"][:2] == [
        "one/run: rtd accuracy replaced",
        "one/run: rtd accuracy original",
    ]


def test_the_axis_counts_tokens(made, tmp_path):
    invoke(*made.runs, "--output", tmp_path, "--x", "tokens")
    lines = plots_of(tmp_path / "report.html")["mlm-loss"]["lines"]
    length = read_history(made.runs[0], "x").config.data.sequence_length
    assert [point["x"] for point in lines[0]["points"]] == [
        8 * length * step for step in range(1, STEPS + 1)
    ]
    assert len(lines) == 2  # a reference knows steps only


def test_training_says_how_it_stands_beside_the_reference(made):
    said = re.findall(r"((?:not )?healthy by step (\d+)): mlm \d", made.output)
    assert [int(step) for _, step in said] == [1, 2, 5, 10]
    facts = json.loads(invoke(made.runs[1], "--json", "--output", made.runs[1].parent / "page"))
    assert [verdict["step"] for verdict in facts[0]["verdicts"]] == [1, 2, 5, 10]
    for verdict in facts[0]["verdicts"]:
        assert verdict["text"] in made.output


def test_events_are_told_and_escaped(made, tmp_path):
    run = shutil.copytree(made.runs[0], tmp_path / "run")
    folder = RunFolder(run)
    folder.note_restart(6, 2, [f"node {NASTY}"])
    window = {"end_position": 9, "first_position": 1, "sequence_length": 32}
    back = {"at_step": 9, "commit_step": 6, "number": 1, "reason": "spike", "windows": [window]}
    (run / "skipped_data.jsonl").write_text(json.dumps(back) + "\n")
    (run / "slurm").mkdir()
    decisions = {"start": "on n1", "requeue": "preempted", "end": "the run is done"}
    lines = [
        {"step": 6, "decision": decision, "reason": reason, "unix_seconds": 1e9}
        for decision, reason in decisions.items()
    ]
    (run / "slurm" / "restarts.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    folder.write_status("hang", 12, "rank 3 is behind")
    events = [(event.kind, event.step) for event in read_history(run, "x").events]
    expected = [("start", 0), ("resume", 6), ("requeue", 6), ("job", 6), ("roll-back", 9)]
    assert events == [*expected, ("hang", 12)]
    invoke(run)
    text = (run / "report" / "report.html").read_text()
    for words in ("back to step 6: spike", "requeue: preempted", "2001-09-09 01:46:40"):
        assert words in text
    assert "2 ranks; node &lt;/script&gt;&lt;script&gt;" in text
    assert "hang: rank 3 is behind" in text


def test_a_run_that_is_going_on_can_be_shown(made, tmp_path):
    run = shutil.copytree(made.runs[0], tmp_path / "run")
    written = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines = [line for line in written if "train/mlm_loss" in line]
    broken = {**json.loads(lines[2]), "train/mlm_loss": None}
    (run / "metrics.jsonl").write_text(
        "".join([*lines[:2], json.dumps(broken) + "\n", lines[3][:9]])
    )
    panels = panels_of([read_history(run, "x")], (), "steps")
    [line] = next(panel for panel in panels if panel.name == "mlm-loss").lines
    assert len(line.points) == 2
    assert line.not_finite == (3.0,)
    # Before the first row there is nothing to draw, and that is no error.
    (run / "metrics.jsonl").unlink()
    (run / "state.json").unlink()
    invoke(run, "--output", tmp_path / "none")
    assert plots_of(tmp_path / "none" / "report.html") == {}


def test_long_runs_are_thinned(made, tmp_path):
    run = shutil.copytree(made.runs[0], tmp_path / "run")
    values = np.random.default_rng(3).random(3 * MAX_POINTS - 1)
    lines = [json.dumps({"step": i + 1, "train/mlm_loss": v}) for i, v in enumerate(values)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    [panel] = panels_of([read_history(run, "x")], (), "steps")
    [line] = panel.lines
    assert len(line.points) == MAX_POINTS
    assert line.points[1].y == pytest.approx(values[3:6].mean())
    assert (line.points[1].low, line.points[1].high) == (values[3:6].min(), values[3:6].max())
    assert line.points[1].x == 6


def test_figures_of_no_known_kind_have_panels_of_their_own(made, tmp_path):
    run = shutil.copytree(made.runs[0], tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 1, "probe/Minimal_pairs": 0.6}\n')
    [panel] = panels_of([read_history(run, "x")], (), "steps")
    assert (panel.name, panel.title) == ("probe-minimal-pairs", "probe/Minimal_pairs")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{one}", "{one}"], "{one} is named twice; name every run once"),
        (
            ["{one}", "{two}"],
            "--output FOLDER is missing: the page of several runs belongs to none",
        ),
        (["{tmp}"], "{tmp}: is no run folder (config.resolved.json is missing)"),
        (["{one}", "--output", "{one}/state.json"], "cannot be made (File exists); choose another"),
        (["{one}", "--reference", "{one}/state.json"], "state.json: is no reference curve"),
        (["{one}", "--write-reference", "{tmp}/x"], "--data is missing: say what the text is"),
    ],
)
def test_wrong_words_are_told(made, tmp_path, words, told):
    names = {"one": made.runs[0], "two": made.runs[1], "tmp": tmp_path}
    with pytest.raises(UserError, match=re.escape(told.format(**names))):
        invoke(*(word.format(**names) for word in words))


def test_what_makes_no_reference_is_told(made, tmp_path):
    one, two = made.runs

    def refused(*runs):
        with pytest.raises(UserError) as caught:
            invoke(*runs, "--write-reference", tmp_path / "x.json", "--data", "speeches")
        assert not (tmp_path / "x.json").exists()
        return str(caught.value)

    copy = shutil.copytree(one, tmp_path / "copy")
    assert "the runs have the seeds [42, 42]; each needs one of its own" in refused(one, copy)
    RunFolder(copy).write_status("stopped", 12)
    assert f"{copy}: is stopped; a reference is made of runs that are done" in refused(copy)
    other = shutil.copytree(two, tmp_path / "other")
    resolved = other / "config.resolved.json"
    changed = resolved.read_text().replace('"mask_prob": 0.15', '"mask_prob": 0.2')
    resolved.write_text(changed)
    assert "objective.mask_prob differs from that of" in refused(one, other)
    for commit in (other / "checkpoints").glob("step-*"):
        shutil.rmtree(commit)
    resolved.write_text((two / "config.resolved.json").read_text())
    assert f"{other}: has another dataset than {one}" in refused(one, other)


def test_broken_files_are_told(made, tmp_path):
    run = shutil.copytree(made.runs[0], tmp_path / "run")
    first, *others = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([first[:-1], *others]))
    with pytest.raises(UserError, match=r"metrics.jsonl, line 1: is not JSON .*; remove the line"):
        invoke(run)
    (run / "metrics.jsonl").write_text("\n".join(["3", *others]))
    with pytest.raises(UserError, match=r"metrics.jsonl, line 1: has no 'step'; remove the line"):
        invoke(run)
    (run / "metrics.jsonl").write_text("\n".join([first, *others]))
    starts = run / "restarts.jsonl"
    whole = starts.read_text()
    starts.write_text('{"step": 0, "world_size": 1, "notes": []}\n')
    with pytest.raises(UserError, match=r"restarts.jsonl, line 1: has no 'unix_seconds'; remove"):
        invoke(run)
    starts.write_text(whole)
    (run / "state.json").write_text("[]")
    with pytest.raises(UserError, match=r"state.json: is no JSON object; restore it"):
        invoke(run)
    (run / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state.json: cannot be read \(.*\); restore it"):
        invoke(run)
    resolved = json.loads((run / "config.resolved.json").read_text())
    del resolved["batch"]["world_size"]
    (run / "config.resolved.json").write_text(json.dumps(resolved))
    with pytest.raises(UserError, match="the block `batch` has no 'world_size'"):
        invoke(run)


def test_a_browser_shows_the_page(made, tmp_path):
    invoke(*made.runs, "--output", tmp_path)
    page = tmp_path / "report.html"
    assert all(
        a.startswith("data:image/svg+xml;base64,") for a in _Page(page.read_text()).addresses
    )
    seen = look(page, tmp_path)
    assert "<title>one/run, two/run</title>" in seen.dom
    # What the browser holds: each plot is shown, and has lines that are no stubs.
    plots = json.loads(dict(_Page(seen.dom).scripts)["application/json"])
    assert {"mlm-loss", "rtd-loss", "rtd-auc", "minimal-pairs", "learning-rate"} <= {
        plot["name"] for plot in plots
    }
    assert len(seen.widths) == len(plots) > 12
    assert min(seen.widths) > 300
    for plot in plots:
        lines = [*plot["lines"], *plot["marks"]]
        assert {line["run"] for line in lines} >= {0, 1}, plot["name"]
        for line in lines:
            if line["run"] >= 0:
                finite = [point for point in line["points"] if np.isfinite(point["y"])]
                assert len(finite) >= 10, (plot["name"], line["label"])
    for colour in (BLUE, VERMILION):
        assert seen.count(colour) > 500


def test_a_browser_shows_the_card(made, tmp_path):
    run = made.runs[0]
    export_run(run, tmp_path / "export", dtype="fp32", licence="mit")
    history = read_history(run, "x")
    panels = overview_panels(history)
    names = ("mlm-loss", "rtd-loss", "mlm-accuracy", "rtd-accuracy", "learning-rate")
    assert tuple(panel.name for panel in panels) == names
    for panel in panels:
        for line in (*panel.lines, *panel.marks):
            assert sum(np.isfinite(point.y) for point in line.points) >= 10, line.label
    # A place without a plot is left empty.
    assert [axes.axison for axes in overview(history).axes] == [True] * 5 + [False]
    repository = tmp_path / "export" / "discriminator"
    card = ModelCard.load(repository / "README.md")
    page = repository / "card.html"
    body = MarkdownIt("commonmark").enable("table").render(card.text)
    page.write_text(f"<!DOCTYPE html><html><body>{body}</body></html>", encoding="utf-8")
    seen = look(page, tmp_path)
    assert _Page(seen.dom).addresses[-1] == CURVES
    assert len(seen.widths) == 1
    assert seen.widths[0] > 1000
    for colour in (BLUE, VERMILION):
        assert seen.count(colour) > 500
    for name in ("eval/mlm_loss", "eval/minimal_pairs_generator"):
        cell = f"<td>{name.removeprefix('eval/')}</td>\n<td>{history.last(name):.4f}</td>"
        assert cell in seen.dom


def test_a_card_without_rows_to_draw_has_no_picture(made, tmp_path):
    run = shutil.copytree(made.runs[0], tmp_path / "run")
    config = read_history(run, "x").config
    (run / "metrics.jsonl").write_text('{"step": 1, "perf/mfu": 0.5}\n')
    facts = export_facts(find_commit(run), config, "fp32", "", ())
    assert facts.history is None
    assert CURVES not in model_card("discriminator", facts, 1)
