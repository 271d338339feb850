"""Training worlds that are hurt on purpose, and what an undisturbed run would have done.

    Lab.run          a world to its end; an `Outcome`
    Lab.start        a world in the background; a `Running` to wait for, to signal and to ask
    Lab.reference    the fingerprint of the same run undisturbed, trained once a session
    Lab.finish       the same command once more, to the end, and nothing differs from the reference

Worlds are forked (`tests.faults.forks`) unless a test is about a launcher. Everything that is
started is killed at the end of its test or at its timeout, whatever happens.
"""

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.faults import VARIABLE
from tests.faults.fingerprint import Fingerprint, fingerprint
from tests.faults.forks import close_shared_server, shared_server
from tests.faults.running import TIMEOUT_SECONDS, Outcome, Running
from tests.worlds import ROOT, command, environment

MAX_STEPS = 12
# A row a step, so that every loss is seen in full.
WORDS = ("logging.interval_steps=1", f"schedule.max_steps={MAX_STEPS}")


@dataclass(frozen=True)
class Setup:
    """One way to train: what decides the numbers of a run."""

    ranks: int = 1
    stage: int = 1
    precision: str = "fp32"
    words: tuple[str, ...] = ()
    batch: int = 8
    micro_batch: int = 0
    """0 is what gives two micro steps."""

    @property
    def micro(self) -> int:
        """Sequences of a micro batch."""
        return self.micro_batch or max(1, self.batch // self.ranks // 2)


class Lab:
    """What starts worlds on the small corpus, and remembers undisturbed ones."""

    def __init__(self, folder: Path, dataset: Path, write_toml: Callable[[Path], None]) -> None:
        self.folder = folder
        self.dataset = dataset
        self._write_toml = write_toml
        self._references: dict[Setup, Fingerprint] = {}
        self._reference_folders: dict[Setup, Path] = {}

    def _files(self, setup: Setup) -> tuple[Path, Path]:
        """The TOML and the DeepSpeed JSON of a setup."""
        toml = self.folder / "tiny.toml"
        if not toml.exists():
            self._write_toml(toml)
        value: dict[str, Any] = {
            "train_batch_size": setup.batch,
            "train_micro_batch_size_per_gpu": setup.micro,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": setup.precision == "bf16"},
            "zero_optimization": {"stage": setup.stage, "reduce_bucket_size": 1_000_000},
        }
        if setup.precision == "bf16":
            value["data_types"] = {"grad_accum_dtype": "fp32"}
        name = f"zero{setup.stage}-{setup.precision}-{setup.micro}-{setup.batch}.json"
        (self.folder / name).write_text(json.dumps(value))
        return toml, self.folder / name

    @contextlib.contextmanager
    def start(
        self,
        run: Path,
        setup: Setup,
        *words: str,
        fault: str = "",
        launcher: str = "fork",
        variables: dict[str, str] | None = None,
        dataset: Path | None = None,
        **options: Any,
    ) -> Iterator[Running]:
        """Start a world; it is dead when the block ends.

        Args:
            run: The run folder.
            setup: How to train.
            *words: Of this start only, such as what may change on resume.
            fault: DEBERTA_FAULT.
            launcher: "fork", or one of `tests.worlds.command`.
            variables: More of the environment.
            dataset: Instead of the small corpus.
            **options: Of a forked world: `present` ranks, `clock_jump_seconds`.

        Yields:
            The world.
        """
        log = self.folder / f"{time.monotonic_ns()}.log"
        environs = {**(variables or {}), VARIABLE: fault}
        if launcher == "fork":
            alone = self.command_line(run, setup, *words, dataset=dataset, launcher="python")
            behind_module = alone[alone.index("pipeline.train") + 1 :]
            running = self._fork(run, behind_module, log, environs, ranks=setup.ranks, **options)
        else:
            with log.open("wb") as file:
                process = subprocess.Popen(
                    self.command_line(run, setup, *words, dataset=dataset, launcher=launcher),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**environment(), **environs},
                    cwd=ROOT,
                )
            running = Running(run, log.with_suffix(".json"), log, process.pid, process)
        try:
            yield running
        finally:
            running.kill()

    def command_line(
        self,
        run: Path,
        setup: Setup,
        *words: str,
        dataset: Path | None = None,
        launcher: str = "torchrun",
    ) -> list[str]:
        """What a user would type; arguments as for `start`."""
        # Each key once: what is said later counts.
        chosen = {word.partition("=")[0]: word for word in (*WORDS, *setup.words, *words)}
        start = (*self._files(setup), dataset or self.dataset, run, *chosen.values())
        return command(*start, ranks=setup.ranks, launcher=launcher)

    def _fork(
        self, run: Path, words: list[str], log: Path, variables: dict[str, str], **options: Any
    ) -> Running:
        ranks = options.setdefault("ranks", 1)
        request = {
            "program": "train",
            "words": words,
            "present": [*range(ranks)],
            "log": str(log),
            "notes": str(log.with_suffix(".json")),
            "samples": f"{run}.samples",
            "variables": variables,
            "clock_jump_seconds": 0.0,
            **options,
        }
        return Running(run, log.with_suffix(".json"), log, shared_server().launch(request))

    @contextlib.contextmanager
    def start_command(self, *words: object, folder: Path) -> Iterator[Running]:
        """Start `deberta WORDS` in the background; it is dead when the block ends."""
        log = self.folder / f"{time.monotonic_ns()}.log"
        running = self._fork(folder, [str(w) for w in words], log, {}, program="deberta")
        try:
            yield running
        finally:
            running.kill()

    def run(self, run: Path, setup: Setup, *words: str, **options: Any) -> Outcome:
        """Run a world to its end; `seconds` and `grace_seconds` are of `Running.wait`."""
        seconds = options.pop("seconds", TIMEOUT_SECONDS)
        grace_seconds = options.pop("grace_seconds", None)
        with self.start(run, setup, *words, **options) as running:
            return running.wait(seconds, grace_seconds)

    def reference(self, setup: Setup) -> Fingerprint:
        """The same run undisturbed."""
        if setup not in self._references:
            run = self.folder / f"reference-{len(self._references)}"
            outcome = self.run(run, setup)
            assert set(outcome.codes) == {0}, outcome.output
            self._references[setup] = fingerprint(run)
            self._reference_folders[setup] = run
        return self._references[setup]

    def reference_folder(self, setup: Setup) -> Path:
        """Its run folder, to copy and not to change."""
        self.reference(setup)
        return self._reference_folders[setup]

    def copy_reference(self, setup: Setup, run: Path, step: int) -> None:
        """Make a run folder in which the undisturbed run has come to the commit of a step."""
        ignore = shutil.ignore_patterns("tensorboard", "logs")
        shutil.copytree(self.reference_folder(setup), run, ignore=ignore)
        for path in (run / "checkpoints").glob("step-*"):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        (run / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
        state = {"status": "running", "step": step, "reason": ""}
        (run / "state.json").write_text(json.dumps(state))

    def finish(self, run: Path, setup: Setup, *words: str) -> Outcome:
        """Resume to the end and compare with the undisturbed run; fails where they differ."""
        outcome = self.run(run, setup, *words)
        assert set(outcome.codes) == {0}, outcome.output
        assert not (found := fingerprint(run).differences(self.reference(setup))), found[:5]
        return outcome

    def close(self) -> None:
        """End the fork server."""
        close_shared_server()
