"""A commit of both networks against torch.save of the same tensors.

    commit                slices to the host, safetensors, fsync, sha256 read back, manifest, rename
    commit, asynchronous  what training waits for of the same: the copy in memory
    torch.save            one file, as most training loops leave it: in the page cache
    torch.save, fsync     the same, on the disk

Wall time: what training waits for. The disk is the one of the temporary folder. From it follows the
share of a run that waits where there is a commit every ten minutes, and what the write beside it
takes from a training loop that only computes, on the same cores.
"""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pipeline.checkpoint import CheckpointStore
from pipeline.config import CheckpointSection
from pipeline.config_loading import load_run_config
from pipeline.ds_config import check_deepspeed_config
from pipeline.run_folder import fsync_file
from pipeline.runtime import World
from tests.benchmarks.rounds import Case, Outcome, main, measure, require

WORDS = [
    "model.vocab_size=32_100",
    *(
        f"{network}.{key}"
        for network in ("generator", "discriminator")
        for key in ("hidden_size=256", "num_attention_heads=4", "intermediate_size=1024")
    ),
    "generator.num_hidden_layers=3",
    "discriminator.num_hidden_layers=6",
]
DEEPSPEED = {
    "train_batch_size": 1,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "zero_optimization": {"stage": 1},
}
ROUNDS = 5
COMMIT_INTERVAL_SECONDS = 600
NUM_PRODUCTS = 1000


def start():
    """Both engines around networks of some 20 million parameters, and the control group."""
    from pipeline.engine import start_engines
    from pipeline.runtime import start_world
    from pipeline.weights import new_pair

    config = load_run_config("deberta_v3_large", WORDS)
    ds = check_deepspeed_config(DEEPSPEED, "benchmark.json")
    world = World(0, 0, 1, torch.device("cpu"))
    control = start_world(world)
    engines = start_engines(
        new_pair(config).trained_modules(),
        optimizer=config.optimizer,
        ds=ds,
        plan=ds.batch_plan(1),
        world=world,
    )
    return engines.by_name, control


def compute_seconds() -> float:
    """Wall time of a fixed amount of computing, long enough for a whole write beside it."""
    matrix = torch.full((512, 512), 1 / 512)
    start = time.perf_counter()
    for _ in range(NUM_PRODUCTS):
        matrix = matrix @ matrix
    return time.perf_counter() - start


def benchmark(_device: str) -> Outcome:
    require("deepspeed", "safetensors")
    from pipeline.engine_state import local_slices

    engines, control = start()
    tensors = {
        f"{network}/{kind}/{part.name}": values
        for network, engine in engines.items()
        for part in local_slices(engine, 0)
        for kind, values in part.tensors.items()
    }
    num_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        waiting = CheckpointStore(folder, CheckpointSection(interval_steps=1), 0, control)
        section = CheckpointSection(interval_steps=1, asynchronous=True)
        beside = CheckpointStore(folder, section, 0, control)
        config = json.dumps(DEEPSPEED)

        def clean():
            beside.finish()
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

        def save(syncs: bool):
            path = folder / "all.pt"
            torch.save({key: value.cpu() for key, value in tensors.items()}, path)
            if syncs:
                fsync_file(path)

        cases = [
            Case("commit", lambda: waiting.save(1, engines, {}, config), clean),
            Case("commit, asynchronous", lambda: beside.save(1, engines, {}, config), clean),
            Case("torch.save", lambda: save(False), clean),
            Case("torch.save, fsync", lambda: save(True), clean),
        ]
        seconds, notes = measure(cases, ROUNDS, time.perf_counter)
        slowed = []
        for _ in range(ROUNDS):
            clean()
            alone = compute_seconds()
            beside.save(1, engines, {}, config)
            slowed.append(compute_seconds() - alone)
        clean()
    torch.distributed.destroy_process_group()
    return Outcome(
        benchmark="checkpoint",
        unit="GB",
        work=num_bytes / 1e9,
        clock="seconds",
        seconds=seconds,
        pairs=[
            ("commit", "torch.save"),
            ("commit", "torch.save, fsync"),
            ("commit, asynchronous", "commit"),
        ],
        shape={"words": WORDS, "bytes": num_bytes, "zero_stage": 1},
        facts={
            **{
                f"{case}: % of wall time waited at one in 10 minutes": 100
                * statistics.median(seconds[case])
                / COMMIT_INTERVAL_SECONDS
                for case in ("commit", "commit, asynchronous")
            },
            "commit, asynchronous: % of wall time that computing slows down": 100
            * statistics.median(slowed)
            / COMMIT_INTERVAL_SECONDS,
        },
        notes=notes,
    )


if __name__ == "__main__":
    main(benchmark, devices=["cpu"])
