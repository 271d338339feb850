"""Fewer micro steps than the JSON says: the weights of plain AdamW on the same sums, all stages.

A non-finite step is in between; bias correction is on or off, the state on the device or in CPU
memory. `tests/micro_steps.py` trains.
"""

import json
import subprocess
import sys

import pytest

from tests.micro_steps import CASES, STEPS
from tests.worlds import ROOT, TIMEOUT_SECONDS, environment

pytestmark = pytest.mark.distributed

# fp32 sums in another order: seven steps of 1e-2 leave about 1e-7.
TOLERANCE = 1e-6


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def measured(request, tmp_path_factory):
    """Case -> what each rank measured, from one world for all cases."""
    ranks, folder = request.param, tmp_path_factory.mktemp("micro_steps")
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    done = subprocess.run(
        [
            *(sys.executable, "-m"),
            *(launcher if ranks > 1 else ()),
            *("tests.micro_steps", str(folder)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment(),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout
    seen = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return {case: [of_rank[case] for of_rank in seen] for case in seen[0]}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_weights_are_those_of_plain_adamw(measured, case):
    for of_rank in measured[str(case)]:
        assert of_rank["weight"] < TOLERANCE
        assert of_rank["norm"] < TOLERANCE
        assert of_rank["adam_step"] == sum(is_finite for _, is_finite in STEPS)


def test_bf16_is_added_up_by_the_optimizers_that_the_shipped_files_have(measured):
    """Stage 1 has one of its own for bf16; a DeepSpeed without it would be untested here."""
    names = {case: figure[0]["optimizer"] for case, figure in measured.items() if "bf16" in case}
    assert names["stage 1 bf16"] == "BF16_Optimizer"
    assert names["stage 2 bf16"] == "DeepSpeedZeroOptimizer"
