"""A trained run, exported and evaluated by the commands, as a user and a stranger would."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.image
import pytest
from huggingface_hub import ModelCard

from tests.forked_worlds import train
from tests.worlds import ROOT, environment, rows

pytestmark = pytest.mark.timeout(600)

# As on a machine with nothing of ours: the folder, torch and transformers.
STRANGER = """
import json, sys
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
folder, text = sys.argv[1:]
model, loading = AutoModel.from_pretrained(folder + "/discriminator", output_loading_info=True)
generator, more = AutoModelForMaskedLM.from_pretrained(
    folder + "/generator", output_loading_info=True
)
ids = AutoTokenizer.from_pretrained(folder + "/discriminator")(text)["input_ids"]
print(json.dumps({
    "missing": [*loading["missing_keys"], *more["missing_keys"]],
    "unexpected": [*loading["unexpected_keys"], *more["unexpected_keys"]],
    "ids": ids,
    "ours": [name for name in ("pipeline", "data_prep", "deepspeed") if name in sys.modules],
}))
"""


def deberta(*words):
    """Run a `deberta` command; (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def trained(tiny_run, deepspeed_json, dataset_folder, tmp_path):
    """A run of 12 steps in fp32 and its export by the command."""
    run, export = tmp_path / "run", tmp_path / "export"
    code, output = train(tiny_run(dropout=0.1), deepspeed_json(1, 4), dataset_folder, run)
    assert code == 0, output
    code, output, errors = deberta("export", run, export, "--license", "cc-by-4.0")
    assert code == 0, errors
    return SimpleNamespace(run=run, export=export, output=output)


def test_from_run_to_scores(trained, dataset_folder, tmp_path):
    assert "step 12" in trained.output
    assert "AutoModel.from_pretrained" in trained.output
    cards_tell_of_the_run(trained)
    stranger_loads(trained.export, dataset_folder, tmp_path)
    heldout_figures_are_those_of_training(trained, dataset_folder)
    fine_tuning(trained.export, tmp_path)
    mistakes(trained)


def cards_tell_of_the_run(trained):
    for repository in trained.export.iterdir():
        card = ModelCard.load(repository / "README.md")
        assert card.data.license == "cc-by-4.0"
        assert re.search(r"\| computed on \| 1 x .*, 0\.\d+ hours in the steps", card.text)
        assert "`deberta-prep build " in card.text
        assert "](curves.png)" in card.text
        height, width, _ = matplotlib.image.imread(repository / "curves.png").shape
        assert height > 1000
        assert width > 1000


def stranger_loads(export, dataset_folder, tmp_path):
    from data_prep.tokenizer import Tokenizer

    text = "\ufb01ne \uff2f\uff2b\u00a0\U0001f600 \u6f22\u5b57 the state of the Union"
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(export), text],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["missing"] == []
    assert all(name.startswith("mask_predictions.") for name in answer["unexpected"])
    assert answer["ours"] == []
    tokenizer = Tokenizer.load(dataset_folder / "tokenizer")
    assert answer["ids"] == [1, *tokenizer.encode(text), 2]


def heldout_figures_are_those_of_training(trained, dataset_folder):
    logged = [row for row in rows(trained.run) if "eval/mlm_loss" in row]
    last = {key: value for key, value in logged[-1].items() if key != "step"}
    code, output, errors = deberta(
        "evaluate", trained.run, "--dataset", dataset_folder, "--device", "cpu", "--json"
    )
    assert code == 0, errors
    report = json.loads(output)["heldout"]
    assert report["step"] == logged[-1]["step"] == 12
    assert report["figures"] == last, "the same arithmetic on the same weights"
    code, output, errors = deberta(
        "evaluate", trained.export, "--dataset", dataset_folder, "--device", "cpu", "--json"
    )
    assert code == 0, errors
    assert json.loads(output)["heldout"]["figures"] == pytest.approx(last, rel=1e-5)


def fine_tuning(export, tmp_path):
    for name in ("train", "test"):
        lines = [f"the {w} of {i}\t{w}\n" for i in range(12) for w in ("war", "peace")]
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\n" + "".join(lines))
    files = ("--train", tmp_path / "train.tsv", "--test", tmp_path / "test.tsv")
    code, output, errors = deberta(
        *("evaluate", export, *files, "--seeds", 2, "--epochs", 2, "--max-length", 32)
    )
    assert code == 0, errors
    assert "pre-trained" in output
    assert "majority class" in output
    assert errors.count("accuracy") == 4


def mistakes(trained):
    code, output, errors = deberta("export", trained.run, trained.export)
    assert (code, output) == (2, "")
    assert errors.count("\n") == 1
    assert "--force" in errors
    code, _, errors = deberta("evaluate", trained.export, "--train", "none.csv", "--test", "x.csv")
    assert code == 2
    assert errors == "error: none.csv: cannot be read: No such file or directory\n"
    code, output, _ = deberta("evaluate", "--help")
    assert code == 0
    assert "deberta evaluate exports/base" in output
