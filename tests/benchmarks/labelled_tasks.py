"""What pre-training with this project is worth: labelled tasks, against a random start.

    make scores                    an hour or two on a CPU; goes on after an interruption

    1. text       general_english.py and labelled_text.py fetch packages by name
    2. dedup      without what is there twice, or in a test or dev file of the tasks
    3. tokenizer, dataset, training (pretraining/*.toml), export, held-out figures
    4. scores     `deberta evaluate` on each task: three seeds, both starts, the same recipe
    5. results    results/labelled-tasks/MODEL-DEVICE.json, and the table by labelled_table.py

Stages 2 to 4 are the commands that a user would type; they are printed, their outputs are in
WORK/logs, and the results name them. What is done is not done again: training resumes, and a task's
scores are kept as long as its command and the model's weights stay the same.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.general_english import write_general_english
from tests.benchmarks.labelled_table import table
from tests.benchmarks.labelled_text import PACKAGES, NoPackage, write_labelled_text
from tests.benchmarks.real_text import NoText, sha256_of
from tests.benchmarks.rounds import RESULTS, device_name, slug, versions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIGS = HERE / "pretraining"
NUM_PIECES = 8000
SEEDS = 3
SOURCES = Path("english/sources.json")


class ScoredTask(NamedTuple):
    """A task and how it is fine-tuned, from both starts alike."""

    name: str
    title: str
    train: str
    test: str
    epochs: int
    learning_rate: float
    batch_size: int
    max_train: int | None = None
    """Training examples, evenly spaced; all where None."""

    def words(self, export: str) -> list[str]:
        """The command, but for its output."""
        files = ["--train", f"labelled/{self.train}", "--test", f"labelled/{self.test}"]
        rate, size = f"{self.learning_rate:g}", str(self.batch_size)
        recipe = ["--epochs", str(self.epochs), "--learning-rate", rate, "--batch-size", size]
        recipe += [] if self.max_train is None else ["--max-train", str(self.max_train)]
        return ["deberta", "evaluate", export, *files, "--seeds", str(SEEDS), *recipe]


def _brown(size: int, epochs: int) -> ScoredTask:
    title, train = f"Brown, 44 tags, {size:,} sentences", f"brown-{size}.conll"
    return ScoredTask(f"brown-{size}", title, train, "brown-test.conll", epochs, 1e-3, 8)


# Brown's recipe is the best of four for the random start after 200 sentences, one seed on the dev
# file; the passes are fewer where there is more to read. The other tasks' were not tried out: 2,000
# examples and two passes, so that all but the last one fit into an hour of one core.
TASKS = (
    _brown(200, 10),
    ScoredTask(
        *("trec", "TREC-6, 2,000 questions", "trec-train.jsonl", "trec-test.jsonl"),
        *(2, 5e-4, 16, 2000),
    ),
    ScoredTask(
        *("movies", "film reviews, 2,000", "movies-train.jsonl", "movies-test.jsonl"),
        *(2, 5e-4, 16, 2000),
    ),
    _brown(2000, 2),
    _brown(500, 8),
)


class StageFailed(Exception):
    """A command failed; the message names it and its log."""


class Scores:
    """One pre-training and its scores, in a folder that keeps the data for others.

    Args:
        work: The folder.
        config: What is trained, a TOML; its name is that of the model's folder.
        deepspeed: How it is computed, a JSON.
        training: Further words for `deberta train`, such as schedule.max_steps=3000.
    """

    def __init__(self, work: Path, config: Path, deepspeed: Path, training: Sequence[str] = ()):
        self._work = work
        self._config = config
        self._deepspeed = deepspeed
        self._training = training
        self._model = config.stem
        self._commands: list[str] = []
        for name in ("logs", f"{self._model}/scores"):
            (work / name).mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """Fetch texts, find what must go, and make tokenizer and dataset."""
        labelled = self._work / "labelled"
        if not (labelled / "sizes.json").exists():
            sizes = write_labelled_text(labelled, self._work / "packages")
            (labelled / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n")
        if not (self._work / SOURCES).exists():
            write_general_english(self._work / SOURCES.parent)
        text = "english/text"
        parts = [("--decontaminate", f"labelled/*-{part}*.jsonl") for part in ("test", "dev")]
        options = [word for pair in parts for word in pair]
        self.command("dedup", ["deberta-prep", "dedup", text, "--output", "decisions", *options])
        tokenizer = ["--output", "tokenizer", "--vocab-size", str(NUM_PIECES)]
        words = ["deberta-prep", "train-tokenizer", text, *tokenizer]
        self.command("tokenizer", words, is_done=(self._work / "tokenizer").exists())
        build = ["--tokenizer", "tokenizer", "--output", "dataset", "--dedup", "decisions"]
        self.command("dataset", ["deberta-prep", "build", text, *build])

    def pretrain(self) -> None:
        """Train, export, and measure on the held-out split."""
        shutil.copy(self._config, self._work)
        shutil.copy(self._deepspeed, self._work)
        files = ["--config", self._config.name, "--deepspeed_config", self._deepspeed.name]
        run, export = f"{self._model}/run", f"{self._model}/export"
        paths = ["data.path=dataset", f"run.folder={run}"]
        self.command(
            f"{self._model}-training", ["deberta", "train", *files, *paths, *self._training]
        )
        self.command(f"{self._model}-export", ["deberta", "export", run, export, "--force"])
        heldout = ["--dataset", "dataset", "--output", f"{self._model}/heldout.json"]
        self.command(f"{self._model}-heldout", ["deberta", "evaluate", export, *heldout])

    def score(self, task: ScoredTask) -> None:
        """Fine-tune on a task, unless that was done with these weights by this command."""
        words = task.words(f"{self._model}/export")
        key = {"command": shlex.join(words), "weights": self.weights_sha256()}
        path = self.path_of(task)
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if {name: kept[name] for name in key} == key:
                return
        found = path.with_suffix(".partial")
        started_seconds = time.monotonic()
        self.command(
            f"{self._model}-{task.name}", [*words, "--output", str(found.relative_to(self._work))]
        )
        seconds = round(time.monotonic() - started_seconds)
        report = json.loads(found.read_text(encoding="utf-8"))["finetune"]
        value = {**report, **key, "title": task.title, "seconds": seconds}
        found.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        found.rename(path)

    def path_of(self, task: ScoredTask) -> Path:
        """Where the scores of a task are kept."""
        return self._work / self._model / "scores" / f"{task.name}.json"

    def weights_sha256(self) -> str:
        """Hash the exported weights: the discriminator's, or those of the only network."""
        export = self._work / self._model / "export"
        files = [export / name / "model.safetensors" for name in ("discriminator", "generator")]
        return sha256_of(next(path for path in files if path.exists()))

    def command(self, name: str, words: list[str], *, is_done: bool = False) -> None:
        """Run a command in the folder.

        Args:
            name: Of its log.
            words: As a user would type it.
            is_done: Its result is there: it is only told.

        Raises:
            StageFailed: It did not end with 0.
        """
        print("$ " + shlex.join(words), "(done before)" if is_done else "", flush=True)
        self._commands.append(shlex.join(words))
        if is_done:
            return
        modules = {"deberta": "pipeline.cli", "deberta-prep": "data_prep"}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        log = self._work / "logs" / f"{name}.log"
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                [sys.executable, "-m", modules[words[0]], *words[1:]],
                cwd=self._work,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
            )
        if done.returncode:
            tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-10:])
            raise StageFailed(f"{name} ended with {done.returncode}; {log} ends with\n{tail}")

    def document(self, device: str) -> dict[str, Any]:
        """Collect all that the results say.

        Args:
            device: "cpu" or "cuda".

        Returns:
            JSON-ready values.
        """
        scores = {
            task.name: json.loads(self.path_of(task).read_text(encoding="utf-8"))
            for task in TASKS
            if self.path_of(task).exists()
        }
        return {
            "model": self._model,
            "device": device_name(device),
            "date": datetime.now(UTC).date().isoformat(),
            "versions": versions(),
            "cores": os.cpu_count(),
            "commands": self._commands,
            "pretraining": self._pretraining(),
            "labelled": {
                package.file: {"sha256": package.sha256, "licence": package.licence}
                for package in PACKAGES.values()
            },
            "tasks": scores,
        }

    def _pretraining(self) -> dict[str, Any]:
        config = self._read(f"{self._model}/run/config.resolved.json")["run_config"]
        heldout = self._read(f"{self._model}/heldout.json")["heldout"]
        deepspeed = self._read(self._deepspeed.name)
        manifest, dedup = self._read("dataset/manifest.json"), self._read("decisions/dedup.json")
        splits = {shard["split"]: 0 for shard in manifest["shards"]}
        for shard in manifest["shards"]:
            splits[shard["split"]] += shard["num_tokens"]
        metrics = self._work / self._model / "run" / "metrics.jsonl"
        rows = metrics.read_text(encoding="utf-8").splitlines()
        rates = [json.loads(row).get("perf/tokens_per_second") for row in rows]
        speeds = [rate for rate in rates if rate]
        steps = heldout["step"]
        tokens = steps * deepspeed["train_batch_size"] * config["data"]["sequence_length"]
        return {
            "steps": steps,
            "tokens": tokens,
            "tokens_per_second": round(len(speeds) / sum(1 / rate for rate in speeds)),
            "config": config,
            "deepspeed": deepspeed,
            "sources": self._read(str(SOURCES)),
            "documents": dedup["documents"],
            "removed": dedup["removed"],
            "dataset_tokens": splits,
            "heldout": heldout,
            "weights": self.weights_sha256(),
        }

    def _read(self, name: str) -> Any:
        return json.loads((self._work / name).read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages that are left and write the results.

    Args:
        argv: Words after the program's name; the process's own where None.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("scores"), help="folder of all stages")
    parser.add_argument("--steps", type=int, help="of pre-training, in place of the TOML's")
    parser.add_argument("--tasks", nargs="*", choices=[t.name for t in TASKS], help="all if none")
    parser.add_argument("--config", type=Path, default=CONFIGS / "small_english.toml")
    parser.add_argument("--deepspeed", type=Path, default=CONFIGS / "small_english_cpu.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS / "labelled-tasks")
    options = parser.parse_args(argv)
    training = [] if options.steps is None else [f"schedule.max_steps={options.steps}"]
    paths = (options.work, options.config, options.deepspeed)
    scores = Scores(*(path.resolve() for path in paths), training)
    try:
        scores.prepare()
        scores.pretrain()
        for task in TASKS:
            if not options.tasks or task.name in options.tasks:
                scores.score(task)
    except (NoText, NoPackage, StageFailed) as reason:
        sys.exit(str(reason))
    result = scores.document(options.device)
    path = options.results / f"{slug(result['model'])}-{slug(result['device'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (path.parent / "table.md").write_text(table(path.parent), encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
