"""Every combination of task, embedding sharing, update, mask decoder and head: allowed or refused.

48 in all, 22 of them allowed; each of the others is refused for the reason that `why_refused`
gives, and README.md's table says the same.
"""

import re
from itertools import product

import pytest
from pydantic import ValidationError

from pipeline.config import RunConfig
from tests.worlds import ROOT

NETWORK = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
KEYS = ("task", "embedding_sharing", "update", "enhanced_mask_decoder", "rtd_head")
COMBINATIONS = [
    dict(zip(KEYS, values, strict=True))
    for values in product(
        ("rtd", "mlm"),
        ("gdes", "es", "nes"),
        ("decoupled", "joint"),
        (True, False),
        ("debertav3", "electra"),
    )
]
ONE_NETWORK = {
    "rtd_head": "there is no discriminator and nothing is drawn",
    "embedding_sharing": "there is one network and one table",
    "update": "there is one network to update",
}
DEFAULTS = {"rtd_head": "debertav3", "embedding_sharing": "gdes", "update": "decoupled"}
LOST_GRADIENT = (
    '"es" needs objective.update=joint: in decoupled training the gradient of the discriminator\'s'
    " loss in E_G comes after the generator's step and would be lost"
)


def why_refused(combination):
    """Key -> reason; empty for what is allowed."""
    if combination["task"] == "mlm":
        return {
            key: f"{combination[key]!r} means nothing with objective.task=mlm: {reason};"
            " leave it out"
            for key, reason in ONE_NETWORK.items()
            if combination[key] != DEFAULTS[key]
        }
    if (combination["embedding_sharing"], combination["update"]) == ("es", "decoupled"):
        return {"embedding_sharing": LOST_GRADIENT}
    return {}


def build(combination):
    return RunConfig.model_validate(
        {
            "generator": NETWORK,
            "discriminator": None if combination["task"] == "mlm" else NETWORK,
            "objective": combination,
            "optimizer": {"generator_learning_rate": 1e-3},
            "schedule": {"max_steps": 10, "warmup_steps": 2},
        }
    )


def name(combination):
    return "-".join(str(value) for value in combination.values())


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name)
def test_combination(combination):
    expected = why_refused(combination)
    if not expected:
        objective = build(combination).objective
        assert {key: getattr(objective, key) for key in KEYS} == combination
        return
    with pytest.raises(ValidationError) as caught:
        build(combination)
    (error,) = caught.value.errors()
    assert error["type"] == "contradiction"
    assert dict(error["ctx"]["all"]) == expected


def test_22_are_allowed():
    allowed = [combination for combination in COMBINATIONS if not why_refused(combination)]
    assert len(COMBINATIONS) == 48
    assert sum(combination["task"] == "rtd" for combination in allowed) == 20
    assert sum(combination["task"] == "mlm" for combination in allowed) == 2


def readme_rows():
    """The table's rows: for each key the values that a row is about, and its verdict."""
    lines = iter((ROOT / "README.md").read_text().splitlines())
    header = next(line for line in lines if line.startswith("| `objective.task` |"))
    keys = [cell.split(".")[-1] for cell in re.findall(r"`([\w.]+)`", header)]
    next(lines)
    for line in lines:
        if not line.startswith("|"):
            return
        *cells, verdict = (cell.strip() for cell in line.strip("|").split("|"))
        values = [re.findall(r"`(\w+)`", cell) for cell in cells]
        yield dict(zip(keys, values, strict=True)), verdict


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name)
def test_readme_says_so(combination):
    spelled = {key: str(value).lower() for key, value in combination.items()}
    verdicts = [
        verdict
        for row, verdict in readme_rows()
        if all(spelled[key] in values for key, values in row.items())
    ]
    assert len(verdicts) == 1, "each combination stands in one row"
    assert verdicts[0].startswith("refused" if why_refused(combination) else "allowed")
