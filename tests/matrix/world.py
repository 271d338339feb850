"""One rank of a world that trains cells one after another.

    python -m tests.matrix.world CELLS.json REFERENCES RESULTS.jsonl

Rank 0 appends a line to RESULTS for each cell. References that are missing are trained first, each
by one rank. A cell that fails ends the world: what it left behind is no place for the next one.
"""

import gc
import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any


def main(cells_file, references, results):
    """Train all cells of the file; the exit code."""
    import deepspeed  # noqa: F401  before the world: it looks for the launcher itself
    import torch.distributed as dist

    from pipeline.runtime import World, start_world
    from tests.matrix.cells import Cell
    from tests.matrix.oracle import load_or_train
    from tests.matrix.training import measure
    from tests.matrix.truth import TruthKey

    warnings.simplefilter("ignore")
    world = World.from_environment()
    start_world(world, 1)
    gc.freeze()  # DeepSpeed collects a dozen times for every engine
    request = json.loads(Path(cells_file).read_text())
    cells = [Cell(**axes) for axes in request["cells"]]
    keys = sorted({TruthKey.of(cell) for cell in cells}, key=str)
    for key in keys[world.rank :: world.world_size]:
        load_or_train(key, Path(references))
    dist.barrier()
    for cell in cells:
        truth = load_or_train(TruthKey.of(cell), Path(references))
        line: dict[str, Any] = {"cell": cell.to_json()}
        try:
            line["measured"] = measure(
                cell, truth, world, stands_in=request["cpu_adam_stands_in"]
            ).to_json()
        except Exception:  # whatever it is: the table has a cell for it
            line["failure"] = traceback.format_exc()
        if world.is_main or "failure" in line:
            with Path(results).open("a") as file:
                file.write(json.dumps(line) + "\n")
        if "failure" in line:
            return 1
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    from pipeline.train import leave

    leave(main(*sys.argv[1:]))
