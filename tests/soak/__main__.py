"""Kill training at random, again and again, and compare it with a run that nobody disturbed.

    python -m tests.soak --kills 200 [--seed 1] [--minutes 60] [--output tests/soak/results/soak.md]

Every run trains one of the cells (ZeRO stage x precision x ranks), is killed a few times, is always
started again by the same command, and must end with the numbers of its cell's reference run. The
results so far are in the .json beside the table; the same command goes on from there until all
kills are done.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import TINY_RUN
from tests.faults.fingerprint import KINDS, fingerprint
from tests.faults.harness import Lab, Setup
from tests.soak.kills import MAX_STEPS, WORDS, choose, run_and_kill
from tests.soak.results import Results, Run
from tests.soak.small_dataset import make_small_dataset

MODES = ((0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16"))
# A row a step shows every loss; rows of three steps need the sums that a commit carries along.
ROWS = {1: "logging.interval_steps=1", 2: "logging.interval_steps=3"}
CELLS = [
    Setup(ranks, stage, precision, (*WORDS, ROWS[ranks]))
    for stage, precision in MODES
    for ranks in (1, 2)
]
MAX_KILLS_OF_A_RUN = 8


def soak_run(lab: Lab, folder: Path, number: int, seed: int, kills_left: int) -> Run:
    """Train one cell to its end through some kills, and compare."""
    choices = random.Random(f"{seed} {number}")
    setup = CELLS[number % len(CELLS)]
    reference = lab.reference(setup)
    run = folder / f"run-{number}"
    in_background = choices.random() < 0.5
    words = ("checkpoint.asynchronous=true",) if in_background else ()
    planned = min(kills_left, choices.randint(3, MAX_KILLS_OF_A_RUN))
    begun = time.monotonic()
    found = Run(number, setup.stage, setup.precision, setup.ranks, in_background)
    while True:
        step = _committed_step(run)
        if len(found.kills) < planned and step < MAX_STEPS:
            kill = choose(choices, setup.ranks, step)
            outcome, struck = run_and_kill(lab, run, setup, words, kill)
            if struck:
                found.add_kill(kill, outcome.codes)
        else:
            outcome = lab.run(run, setup, *words)
        if set(outcome.codes) == {0}:
            break
        if not _is_expected(outcome.codes) or found.starts > 6 * MAX_KILLS_OF_A_RUN:
            found.problem = outcome.output[-3000:]
            break
        found.starts += 1
    if not found.problem:
        different = fingerprint(run).by_kind(reference)
        found.differences = {kind: len(different[kind]) for kind in KINDS}
        found.examples = [text for texts in different.values() for text in texts[:2]]
    found.seconds = round(time.monotonic() - begun, 1)
    if not found.is_clean:
        kept = folder.parent / f"soak-failed-{number}"
        shutil.copytree(run, kept, dirs_exist_ok=True)
        print(f"kept in {kept}", flush=True)
    shutil.rmtree(run, ignore_errors=True)
    return found


def _committed_step(run: Path) -> int:
    names = [path.name for path in (run / "checkpoints").glob("step-????????")]
    return max((int(name[5:]) for name in names), default=0)


def _is_expected(codes: list[int]) -> bool:
    """Whether a world ended as killed ones do: by a signal, 75, or because a peer was gone."""
    if set(codes) <= {0, 75}:
        return True
    return any(code < 0 for code in codes) and not {2, 86, 87, 88} & {*codes}


def main(argv: Sequence[str] | None = None) -> int:
    """Soak; the exit code says whether all runs were the same as their references."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=0.0, help="end earlier; 0 never")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "soak.md"
    )
    options = parser.parse_args(argv)
    results = Results.load(options.output.with_suffix(".json"), options.seed, options.kills)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        dataset = make_small_dataset(folder)
        lab = Lab(folder, dataset, lambda path: _write_toml(path, dataset))
        try:
            while results.num_kills < options.kills:
                if options.minutes and time.monotonic() - begun > 60 * options.minutes:
                    break
                left = options.kills - results.num_kills
                run = soak_run(lab, folder, len(results.runs), options.seed, left)
                results.add(run, options.output)
                print(run.describe(), f"{results.num_kills} of {options.kills}", flush=True)
        finally:
            lab.close()
    print(options.output.read_text() if options.output.exists() else "nothing was run")
    return int(not results.is_clean)


def _write_toml(path: Path, dataset: Path) -> None:
    from data_prep.shards import Dataset

    vocab_size = Dataset.open(dataset).manifest.vocab_size
    path.write_text(TINY_RUN.format(vocab_size=vocab_size, dropout=0.1))


if __name__ == "__main__":
    sys.exit(main())
