"""Launched runs of two processes on real data, and the plain reference of the same run.

    stage_2   ZeRO-2, four micro steps
    stage_3   ZeRO-3, two micro steps
    killed    as stage_2, but under torchrun, killed at some moment and started again

One launched process costs some ten seconds, most of them imports: the first two are forked.
"""

import json
import signal
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.config_loading import load_run_config
from tests import forked_worlds
from tests.conftest import TINY_RUN
from tests.reference.plain_replay import Replay
from tests.worlds import rows, train, train_and_kill

STEPS, BATCH, HELDOUT = 30, 8, 24
WORDS = (
    f"schedule.max_steps={STEPS}",
    f"evaluation.max_sequences={HELDOUT}",
    "evaluation.interval_steps=0",
    "checkpoint.interval_steps=6",
    "logging.interval_steps=1",
)


@dataclass
class Worlds:
    """Run folders of the launched runs, and what the reference found in each step."""

    config: RunConfig
    plain: list
    stage_2: Path
    stage_3: Path
    killed: Path
    kill_code: int
    killed_at: int
    """Last step whose row was written before the kill."""
    output: str
    """What the second start of the killed run printed."""


def deepspeed_file(folder, stage, micro):
    """Write a DeepSpeed JSON."""
    path = folder / f"zero{stage}-{micro}.json"
    document = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000},
    }
    path.write_text(json.dumps(document))
    return path


def launch_worlds(folder, dataset, vocab_size):
    """Run everything, in a folder of its own."""
    config = folder / "tiny.toml"
    config.write_text(TINY_RUN.format(vocab_size=vocab_size, dropout=0.0))
    runs = {name: folder / name for name in ("stage_2", "stage_3", "killed")}
    for name, stage, micro in (("stage_2", 2, 1), ("stage_3", 3, 2)):
        ds = deepspeed_file(folder, stage, micro)
        code, output = forked_worlds.train(config, ds, dataset, runs[name], *WORDS, ranks=2)
        assert code == 0, output

    arguments = (config, deepspeed_file(folder, 2, 1), dataset, runs["killed"], *WORDS)

    def has_begun():
        return (runs["killed"] / "metrics.jsonl").exists() and len(rows(runs["killed"])) >= 7

    kill_code, _ = train_and_kill(has_begun, signal.SIGKILL, *arguments, ranks=2)
    killed_at = rows(runs["killed"])[-1]["step"]
    code, output = train(*arguments, ranks=2)
    assert code == 0, output
    loaded = load_run_config(str(config), [f"data.path={dataset}", *WORDS])
    plain = Replay(loaded, BATCH).steps(STEPS)
    return Worlds(loaded, plain, **runs, kill_code=kill_code, killed_at=killed_at, output=output)
