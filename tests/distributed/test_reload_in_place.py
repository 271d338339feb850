"""Running engines that go back to a commit: bit for bit what they were, on three ranks.

In the same world, replicated tensors are compared before and after a flipped bit.
`tests/reloading.py` trains.
"""

import json
import subprocess
import sys

import pytest

from tests.reloading import CASES, LOST
from tests.worlds import ROOT, TIMEOUT_SECONDS, environment

pytestmark = pytest.mark.distributed

RANKS = 3


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Case -> what each rank has seen, from one world for all cases."""
    folder = tmp_path_factory.mktemp("reloading")
    module = [sys.executable, "-m", "tests.reloading", str(folder)]
    logs = [(folder / f"rank-{rank}.log").open("w+") for rank in range(RANKS)]
    ranks = [
        subprocess.Popen(
            [*module, str(rank), str(RANKS)],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment(),
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [rank.wait(TIMEOUT_SECONDS) for rank in ranks]
    finally:
        for rank, log in zip(ranks, logs, strict=True):
            rank.kill()
            log.close()
    assert codes == [0] * RANKS, (folder / "rank-0.log").read_text()[-3000:]
    seen = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
    return {case: [of_rank[case] for of_rank in seen] for case in seen[0]}


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_engine_goes_back_bit_for_bit(measured, case, how):
    of_ranks = [of_rank[how] for of_rank in measured[str(case)]]
    assert any(seen["changed"] for seen in of_ranks), "nothing was undone"
    for seen in of_ranks:
        expected = {"a refused step": [True, False]}.get(how, [True])
        assert seen["applied"] == expected
        assert seen["scalars changed"]
        assert seen["differs"] == seen["differs at the end"] == []
        assert seen["same scalars"]
        assert seen["same outcomes"]
        assert seen["same scalars at the end"]


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_flipped_bit_is_found_with_its_rank_and_name_and_cured(measured, case, how):
    # At stage 3 only small parameters are on every rank between steps.
    name = "0.bias" if case.stage == 3 else "0.weight"
    finding = [["generator", [name], [RANKS - 1], RANKS]] if how == "a flipped bit" else []
    for seen in measured[str(case)]:
        assert seen[how]["replicas"] == [0, *finding]
        assert seen[how]["replicas after the reload"] == 0


def test_the_optimizers_are_those_of_the_shipped_files(measured):
    """A DeepSpeed that chose another one would be untested here."""
    kinds = {case: seen[0]["optimizer"] for case, seen in measured.items()}
    assert kinds["stage 0 fp32"] == "FiniteGuardAdamW"
    assert kinds["stage 1 bf16"] == "BF16_Optimizer"
    assert kinds["stage 2 bf16"] == "DeepSpeedZeroOptimizer"
    assert kinds["stage 3 fp32"] == "DeepSpeedZeroOptimizer_Stage3"
