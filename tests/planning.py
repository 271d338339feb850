"""What the tests of `deberta plan` plan: large on eight H100, with single settings changed."""

from pipeline.config_loading import load_run_config
from pipeline.ds_config import check_deepspeed_config
from pipeline.plan.devices import Cluster, gpu_type
from pipeline.plan.planning import evaluate
from pipeline.plan.search import default_deepspeed

H100 = gpu_type("h100")
EIGHT = Cluster.of(H100, 8, 8, 400.0)
LARGE = load_run_config("deberta_v3_large")
MICRO_BATCH = 16


def plan_of(config, cluster=EIGHT, **changes):
    """A plan with some keys of the DeepSpeed JSON changed."""
    return evaluate(config, deepspeed_of(config, **changes), cluster)


def deepspeed_of(config, **changes):
    """The JSON of a plan that was given none, with some keys changed."""
    document = {**default_deepspeed(config, EIGHT).raw}
    document |= {"train_micro_batch_size_per_gpu": MICRO_BATCH, **changes}
    return check_deepspeed_config(document, "test.json")


def with_model(config, **changes):
    """The run with some keys of [model] changed."""
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})
