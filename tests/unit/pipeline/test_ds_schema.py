"""The accepted and refused names, against DeepSpeed 0.19.8 itself."""

import pytest
from pydantic import BaseModel

from pipeline.ds_schema import (
    REFUSED,
    Bf16,
    CommsLogger,
    DataTypes,
    DeepSpeedJson,
    FlopsProfiler,
    Fp16,
    OffloadOptimizer,
    OffloadParam,
    TorchAutocast,
    ZeroOptimization,
)


@pytest.fixture(scope="module", autouse=True)
def _cpu_accelerator():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


class Recorder(dict):
    """A dict that remembers which keys were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = set()

    def _note(self, key):
        if isinstance(key, str):
            self.asked.add(key)

    def __contains__(self, key):
        self._note(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self._note(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self._note(key)
        return super().get(key, default)

    def keys(self):
        return self

    def __copy__(self):
        return self


def decided(prefix: str) -> set[str]:
    """Names under a block that the table refuses."""
    return {
        key.removeprefix(prefix)
        for key in REFUSED
        if key.startswith(prefix) and "." not in key.removeprefix(prefix)
    }


def test_the_top_level_keys_are_exactly_those_that_deepspeed_reads():
    from deepspeed.runtime import config

    document = Recorder({"train_batch_size": 1})
    config.DeepSpeedConfig(document)
    asked = document.asked - {"allgather_size"}  # only read beside "zero_optimization": true
    # Read before our recorder sees it, and only if torch.distributed is up.
    asked |= {"sequence_parallel_size"}
    assert len(asked) > 40  # the recorder saw the parser at work
    assert DeepSpeedJson.model_fields.keys() | decided("") == (
        asked | config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()
    )


@pytest.mark.parametrize(
    ("block", "prefix", "module", "name"),
    [
        (Bf16, "bf16.", "deepspeed.runtime.precision_config", "DeepSpeedBF16Config"),
        (Fp16, "fp16.", "deepspeed.runtime.precision_config", "DeepSpeedFP16Config"),
        (
            ZeroOptimization,
            "zero_optimization.",
            "deepspeed.runtime.zero.config",
            "DeepSpeedZeroConfig",
        ),
        (
            OffloadOptimizer,
            "zero_optimization.offload_optimizer.",
            "deepspeed.runtime.zero.offload_config",
            "DeepSpeedZeroOffloadOptimizerConfig",
        ),
        (
            OffloadParam,
            "zero_optimization.offload_param.",
            "deepspeed.runtime.zero.offload_config",
            "DeepSpeedZeroOffloadParamConfig",
        ),
        (CommsLogger, "comms_logger.", "deepspeed.comm.config", "CommsLoggerConfig"),
    ],
)
def test_every_key_of_a_block_is_accepted_or_refused_on_purpose(block, prefix, module, name):
    import importlib

    theirs: type[BaseModel] = getattr(importlib.import_module(module), name)
    names = {info.alias or field for field, info in theirs.model_fields.items()}
    refused = decided(prefix)
    removed = {"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"}
    assert block.model_fields.keys() | refused - removed == names
    assert not block.model_fields.keys() & refused


def test_the_blocks_that_deepspeed_reads_without_a_model():
    from deepspeed.runtime.config import DeepSpeedConfig

    blocks = {
        "torch_autocast": (TorchAutocast, {"dtype": "bf16"}),
        "data_types": (DataTypes, {}),
        "flops_profiler": (FlopsProfiler, {"enabled": False}),
    }
    for name, (model, content) in blocks.items():
        block = Recorder(content)
        DeepSpeedConfig({"train_batch_size": 1, name: block})
        assert block.asked, name
        assert block.asked == model.model_fields.keys() | decided(f"{name}."), name


@pytest.mark.parametrize("key", [key for key in REFUSED if "was removed" in REFUSED[key]])
def test_what_we_call_removed_deepspeed_refuses_too(key):
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    block, _, name = key.rpartition(".")
    document = {"train_batch_size": 1} | ({block: {name: 1}} if block else {name: {}})
    with pytest.raises(DeepSpeedConfigError, match="removed"):
        DeepSpeedConfig(document)


def test_an_unknown_key_really_is_ignored_by_deepspeed():
    """The reason for the whole table: a spelling mistake trains in fp32."""
    from deepspeed.runtime.config import DeepSpeedConfig

    parsed = DeepSpeedConfig({"train_batch_size": 1, "bf_16": {"enabled": True}})
    assert not parsed.bfloat16_config.enabled


def test_no_name_is_both_accepted_and_refused():
    assert not DeepSpeedJson.model_fields.keys() & REFUSED.keys()


def test_every_refusal_ends_with_a_cure():
    verbs = ("remove it", "write", "is always on", "is set by the program", "no effect")
    assert [key for key, text in REFUSED.items() if not any(verb in text for verb in verbs)] == []
