"""`deberta demo`: raw text to a scored Hugging Face model, by the commands that a user would type.

    1. tokenizer   deberta-prep train-tokenizer on the embedded corpus
    2. dataset     deberta-prep build
    3. training    deberta train, preset `demo`, one process
    4. export      deberta export
    5. loading     AutoModel and AutoTokenizer in a process of their own
    6. held-out    deberta evaluate: the exported files on the held-out split

Every stage can be interrupted; the same command goes on. Each stage's output is in OUTPUT/logs.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data_prep.errors import UserError
from data_prep.shards import Dataset
from pipeline.run_folder import to_json, write_durably

DEEPSPEED = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 32,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000_000},
}
"""How the demo is computed: one process, fp32. Kept here because `ds_configs/` is not installed."""

NUM_PIECES = 4000
HELDOUT_FRACTION = 0.05
LOADING = """from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{path}")
model = AutoModel.from_pretrained("{path}")"""


@dataclass
class Stage:
    """A stage of the demo and what it took."""

    name: str
    seconds: float = 0.0
    result: str = ""


@dataclass
class Demo:
    """One run of the demo in one folder."""

    output: Path
    overrides: Sequence[str] = ()
    stages: list[Stage] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.console = Console()
        self.corpus = _embedded_corpus()
        self.tokenizer = self.output / "tokenizer"
        self.dataset = self.output / "dataset"
        self.run_folder = self.output / "run"
        self.export = self.output / "export"
        self.model = self.export / "discriminator"

    def prepare_folder(self) -> None:
        """Make the folder, or continue in one that an earlier demo made.

        Raises:
            UserError: The folder holds something else.
        """
        marker = self.output / "demo.json"
        if self.output.exists() and any(self.output.iterdir()) and not marker.exists():
            raise UserError(
                f"--output {self.output} is not empty and was not made by the demo: choose another"
            )
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        write_durably(marker, to_json({"made_by": "deberta demo"}))
        write_durably(self.output / "deepspeed.json", to_json(DEEPSPEED))

    def run(self) -> dict[str, Any]:
        """Run all stages.

        Returns:
            The figures of the final table, JSON-ready.

        Raises:
            UserError: A stage failed; the message names it and its log.
        """
        self.prepare_folder()
        self.prepare_data()
        deepspeed_json = str(self.output / "deepspeed.json")
        paths = (f"data.path={self.dataset}", f"run.folder={self.run_folder}")
        train = ["deberta", "train", "--config", "demo", "--deepspeed_config", deepspeed_json]
        self.command("training", [*train, *paths, *self.overrides], show=True)
        export = ["deberta", "export", str(self.run_folder), str(self.export), "--force"]
        self.command("export", export)
        loading = LOADING.format(path=self.model)
        self.stage("loading", lambda log: _run([sys.executable, "-c", loading], log))
        self.evaluate()
        figures = self.figures()
        write_durably(self.output / "figures.json", to_json(figures))
        self.report(figures, loading)
        return figures

    def prepare_data(self) -> None:
        """Train the tokenizer and build the dataset, a paragraph a document."""
        corpus, paragraphs = str(self.corpus), ("--txt-document", "line")
        train = ["deberta-prep", "train-tokenizer", corpus, "--output", str(self.tokenizer)]
        size = ("--vocab-size", str(NUM_PIECES))
        self.command("tokenizer", [*train, *size, *paragraphs], done=self.tokenizer.exists)
        build = ["deberta-prep", "build", corpus, "--tokenizer", str(self.tokenizer)]
        options = ("--workers", "2", "--heldout-fraction", str(HELDOUT_FRACTION), *paragraphs)
        self.command("dataset", [*build, "--output", str(self.dataset), *options])

    def evaluate(self) -> None:
        """Measure the exported model on the held-out split."""
        evaluate = ["deberta", "evaluate", str(self.export)]
        output = ("--output", str(self.output / "heldout.json"))
        self.command("held-out", [*evaluate, "--dataset", str(self.dataset), *output])

    def command(
        self,
        name: str,
        words: list[str],
        *,
        done: Callable[[], bool] = lambda: False,
        show: bool = False,
    ) -> None:
        """Run one of our commands as a stage, unless its result is there.

        Args:
            name: The stage.
            words: The command as a user would type it.
            done: Whether there is nothing to do.
            show: Let its output through to the terminal.
        """
        self.console.print("$ " + " ".join(words), style="bold", highlight=False, soft_wrap=True)
        if done():
            self.stages.append(Stage(name, 0.0, "already there"))
            return
        modules = {"deberta": "pipeline.cli", "deberta-prep": "data_prep"}
        argv = [sys.executable, "-m", modules[words[0]], *words[1:]]
        self.stage(name, lambda log: _run(argv, log, show=show))

    def stage(self, name: str, action: Callable[[Path], int]) -> None:
        """Time a stage and stop the demo where it fails.

        Args:
            name: The stage.
            action: Takes the log's path, returns an exit code.

        Raises:
            UserError: The exit code is not 0.
        """
        log = self.output / "logs" / f"{name}.log"
        started_seconds = time.monotonic()
        code = action(log)
        self.stages.append(Stage(name, time.monotonic() - started_seconds))
        if code:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise UserError(f"the demo's stage {name!r} ended with {code}; {log} ends with\n{tail}")

    def figures(self) -> dict[str, Any]:
        """Collect what the demo shows.

        Returns:
            JSON-ready figures.
        """
        rows = [json.loads(line) for line in (self.run_folder / "metrics.jsonl").open()]
        training = [row for row in rows if "train/mlm_loss" in row]
        heldout = [row for row in rows if "eval/mlm_loss" in row]
        return {
            "seconds": {stage.name: round(stage.seconds, 1) for stage in self.stages},
            "unigram_entropy": unigram_entropy(self.dataset),
            "first": {**training[0], **heldout[0]},
            "last": {**training[-1], **heldout[-1]},
            "heldout": json.loads((self.output / "heldout.json").read_text()),
        }

    def report(self, figures: dict[str, Any], loading: str) -> None:
        """Print the stages, the figures, the folders and how to load the result.

        Args:
            figures: What `figures` returned.
            loading: Python lines.
        """
        table = Table("stage", "seconds", title="stages")
        for stage in self.stages:
            table.add_row(stage.name, stage.result or f"{stage.seconds:.1f}")
        table.add_row("total", f"{sum(stage.seconds for stage in self.stages):.1f}")
        self.console.print(table)
        first, last = figures["first"], figures["last"]
        table = Table("figure", "first", "last", title="learning")
        for name, label in _SHOWN.items():
            table.add_row(label, f"{first[name]:.4f}", f"{last[name]:.4f}")
        table.add_row(
            "unigram entropy of the held-out text, nats", "", f"{figures['unigram_entropy']:.4f}"
        )
        self.console.print(table)
        for label, path in (("dataset", self.dataset), ("run", self.run_folder)):
            self.console.print(f"{label}: {path}", highlight=False)
        self.console.print(f"model: {self.model}, generator: {self.export / 'generator'}")
        self.console.print(f"\n{loading}\n", style="bold", highlight=False)


_SHOWN = {
    "train/mlm_loss": "training MLM loss, nats",
    "train/rtd_loss": "training RTD loss, nats",
    "eval/mlm_loss": "held-out MLM loss, nats",
    "eval/mlm_accuracy": "held-out MLM accuracy",
    "eval/rtd_loss": "held-out RTD loss, nats",
    "eval/rtd_auc": "held-out RTD area under the ROC curve (0.5: cannot tell)",
}


def unigram_entropy(dataset_folder: Path) -> float:
    """Compute the entropy of the held-out tokens under the training split's frequencies.

    A model that knows only how often each token occurs has this loss on masked tokens; unseen
    tokens are given one count.

    Args:
        dataset_folder: A dataset.

    Returns:
        Nats a token.
    """
    dataset = Dataset.open(dataset_folder)
    counts = [
        np.bincount(
            dataset.read(split, 0, dataset.split_tokens(split)),
            minlength=dataset.manifest.vocab_size,
        )
        for split in ("train", "heldout")
    ]
    train = np.maximum(counts[0], 1) / np.maximum(counts[0], 1).sum()
    heldout = counts[1] / counts[1].sum()
    return float(-(heldout * np.log(train)).sum())


def _embedded_corpus() -> Path:
    """Find the corpus that is installed with the package."""
    from data_prep.documents import embedded_corpus

    return Path(embedded_corpus())


def _run(argv: list[str], log: Path, *, show: bool = False) -> int:
    """Run a process into a log; with `show`, its lines also reach the terminal."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as file:
        if not show:
            return subprocess.call(argv, stdout=file, stderr=subprocess.STDOUT, env=environment)
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            print(line, end="", flush=True)
        return process.wait()
