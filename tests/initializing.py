"""Runs that continue a model, and how they are refused."""

import pytest

from data_prep.errors import UserError
from pipeline.initialize.pair import initialize_pair
from tests.commits import run_config


def asked(dataset, path, **sections):
    """A run that continues `path`; sections are replaced as in `run_config`."""
    initialize = {"path": str(path), **sections.pop("initialize", {})}
    return run_config(dataset, dataset.parent / "no run", initialize=initialize, **sections)


def refusal(config, tokenizer) -> str:
    with pytest.raises(UserError) as error:
        initialize_pair(config, tokenizer)
    return str(error.value)
