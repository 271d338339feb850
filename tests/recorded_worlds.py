"""Worlds one after another, forked from one process that has imported everything, on record.

    python -m tests.recorded_worlds PLAN.json

PLAN is a list of worlds: ranks, words behind `-m pipeline.train`, DEBERTA_FAULT, and a file for
the record. Prints a list of the ranks' exit codes for each world. A rank's record has a line a
step: the samples that it was given, and what its optimizers hold after it.
"""

import gc
import json
import os
import sys
from pathlib import Path

from tests.worlds import free_port


def main(plan):
    """Run all worlds; stops where one of them ends otherwise than it should."""
    import torch._inductor.compile_fx  # noqa: F401  deterministic kernels need it
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import pipeline.assemble
    import pipeline.banner  # noqa: F401

    assert len([*Path("/proc/self/task").iterdir()]) == 1, "a fork takes one thread along"
    gc.collect()
    gc.freeze()  # the children's collections need not copy what they share
    print(json.dumps([run_world(world) for world in plan]))


def run_world(world):
    """Fork the ranks of a world and wait for them."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables |= {"WORLD_SIZE": str(world["ranks"]), "DEBERTA_FAULT": world["fault"]}
    pids = []
    for rank in range(world["ranks"]):
        pid = os.fork()
        if pid == 0:
            os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
            train_rank(world["words"], f"{world['record']}-{rank}")
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def train_rank(words, record):
    """Train in a forked child, which never returns."""
    code = 1
    try:
        os.dup2(2, 1)
        on_record(record)
        from pipeline.train import run

        code = run(words)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def on_record(path):
    """Write a line for every step: its samples, and the optimizers behind it."""
    from pipeline.engine_state import inner_optimizer, scalar_state
    from pipeline.training_step import TrainingStep

    take_step = TrainingStep.__call__

    def recorded(self, step, micro_batches, *arguments):
        result = take_step(self, step, micro_batches, *arguments)
        line = {
            "step": step,
            "samples": [batch.sample_words_B2.tolist() for batch in micro_batches],
            "adam_steps": {k: scalar_state(e)["adam_step"] for k, e in self._engines.items()},
            "groups": {k: groups(inner_optimizer(e)) for k, e in self._engines.items()},
        }
        with open(path, "a", encoding="utf-8") as file:  # noqa: PTH123
            file.write(json.dumps(line) + "\n")
        return result

    def groups(optimizer):
        keys = ("name", "network", "lr", "weight_decay", "betas", "eps")
        return [{key: group[key] for key in keys} for group in optimizer.param_groups]

    TrainingStep.__call__ = recorded


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
