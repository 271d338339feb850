"""Fine-tuning under DeepSpeed: the same figures as in one process, for any ranks and stage."""

import json
import shutil

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from pipeline.evaluate.examples import TextExample
from pipeline.evaluate.fitting import Head, fine_tuned
from pipeline.evaluate.kind import Limits
from pipeline.evaluate.kinds import find_kind
from pipeline.evaluate.plan import TrainingPlan
from pipeline.evaluate.sift import SiftOptions
from pipeline.evaluate.stepping import AloneStrategy
from pipeline.evaluate.training import outputs
from tests.engines import deepspeed_config
from tests.forked_worlds import end_of, started
from tests.task_files import write_glue, write_lines

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def steady(exported, tmp_path_factory):
    """An encoder without dropout, which ranks draw for themselves."""
    folder = tmp_path_factory.mktemp("steady") / "model"
    shutil.copytree(exported.folder / "discriminator", folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    values |= {"pooler_dropout": 0.0}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_one_rank_trains_as_torch_does(steady, tokenizer, world, stage, monkeypatch):
    """With micro batches, and a last batch that is not full; Adam alone would hide a scale."""
    import torch.distributed as dist

    from pipeline.evaluate import engine_strategy
    from pipeline.evaluate.engine_strategy import DeepSpeedStrategy

    norms = []
    clip, step = torch.nn.utils.clip_grad_norm_, engine_strategy.step_engine

    def clipped(parameters, most):
        norm = clip(parameters, most)
        norms.append(norm.item())
        return norm

    def stepped(engine):
        outcome = step(engine)
        norms.append(outcome.grad_norm)
        return outcome

    monkeypatch.setattr(engine_strategy, "step_engine", stepped)

    kind, num_outputs = find_kind("classification", ["a", "b"])
    texts = [f"{('war', 'peace')[i % 2]} {i} of the people" for i in range(10)]
    examples = [TextExample(i, text, None, i % 2) for i, text in enumerate(texts)]
    features = kind.features(examples, tokenizer, Limits(16))
    plan = TrainingPlan(8, 5e-3, 4)
    alone = AloneStrategy(CPU)
    shared = DeepSpeedStrategy(deepspeed_config(stage, micro=2), world, dist.group.WORLD)
    found = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    for strategy in (alone, shared):
        head = Head(kind.head, num_outputs)
        with fine_tuned(steady, "pretrained", head, kind, features, plan, 0, strategy) as model:
            found.append(outputs(model, kind, features, 4, strategy))
    assert len(norms) == 2 * 24
    assert norms[24:30] == pytest.approx(norms[:6], rel=1e-2)
    size = np.abs(np.array(found[0])).max()
    assert size > 0.05
    assert np.abs(np.array(found[0]) - np.array(found[1])).max() < 0.01 * size


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_sift_is_the_same_under_deepspeed(steady, tokenizer, world, stage):
    """The noise of the only rank is that of one process; without it the model is another."""
    import torch.distributed as dist

    from pipeline.evaluate.engine_strategy import DeepSpeedStrategy

    kind, num_outputs = find_kind("classification", ["a", "b"])
    texts = [f"{('war', 'peace')[i % 2]} {i} of the people" for i in range(10)]
    examples = [TextExample(i, text, None, i % 2) for i, text in enumerate(texts)]
    features = kind.features(examples, tokenizer, Limits(16))
    sift = SiftOptions(vat_lambda=50.0, vat_learning_rate=0.1, vat_init_perturbation=0.3)
    alone = AloneStrategy(CPU)
    shared = DeepSpeedStrategy(deepspeed_config(stage, micro=4), world, dist.group.WORLD)
    found = []
    for strategy, options in ((alone, sift), (shared, sift), (shared, None)):
        plan = TrainingPlan(8, 5e-3, 4, sift=options)
        head = Head(kind.head, num_outputs)
        with fine_tuned(steady, "pretrained", head, kind, features, plan, 0, strategy) as model:
            found.append(np.array(outputs(model, kind, features, 4, strategy)))
    size = np.abs(found[0]).max()
    assert np.abs(found[1] - found[0]).max() < 0.01 * size
    assert np.abs(found[2] - found[0]).max() > 0.05 * size


def refuse():
    raise UserError("of one rank for all")


def test_what_does_not_go_together(world):
    import torch.distributed as dist

    from pipeline.evaluate.engine_strategy import DeepSpeedStrategy

    strategy = DeepSpeedStrategy(deepspeed_config(), world, dist.group.WORLD)
    kind, _ = find_kind("regression")
    model = torch.nn.Linear(2, 1)
    divided = DeepSpeedStrategy(deepspeed_config(3), world, dist.group.WORLD)
    with pytest.raises(UserError, match=r"--sift with .*ZeRO-3 divides them; give a JSON with"):
        divided.start(model, kind, TrainingPlan(1, 1e-3, 4, sift=SiftOptions()))
    mixed = deepspeed_config(1, precision="autocast")
    with pytest.raises(UserError, match=r"torch_autocast does not reach .* give a JSON with bf16"):
        DeepSpeedStrategy(mixed, world, dist.group.WORLD).start(
            model, kind, TrainingPlan(1, 1e-3, 4, sift=SiftOptions())
        )
    with pytest.raises(UserError, match=r"--bf16 with --deepspeed_config: the precision is test"):
        strategy.start(model, kind, TrainingPlan(1, 1e-3, 4, bf16=True))
    strategy.world_size = 3
    with pytest.raises(UserError, match=r"a batch of 4 examples cannot be divided among 3 ranks"):
        strategy.start(model, kind, TrainingPlan(1, 1e-3, 4))
    with pytest.raises(UserError, match=r"of one rank for all"):
        strategy.agree(refuse)


@pytest.mark.distributed
def test_two_ranks_are_one(steady, tmp_path, deepspeed_json):
    for name, count in (("train", 10), ("test", 7)):
        rows = [{"text": f"war {i * 7 % 10}", "label": i * 7 % 10 / 4} for i in range(count)]
        write_lines(tmp_path / f"{name}.jsonl", rows)
    words = ["evaluate", steady, "--train", tmp_path / "train.jsonl", "--test"]
    words += [tmp_path / "test.jsonl", "--kind", "regression", "--seeds", 1, "--device", "cpu"]
    words += ["--epochs", 3, "--batch-size", 4, "--learning-rate", 1e-3, "--max-length", 16]
    found = {}
    for ranks, stage in ((1, None), (2, 1), (2, 3)):
        extra = ["--output", tmp_path / f"{ranks}-{stage}.json"]
        if stage is not None:
            extra += ["--deepspeed_config", deepspeed_json(stage, micro=1)]
        with started("deberta", [*words, *extra], tmp_path / f"world-{ranks}-{stage}", ranks) as w:
            code, output = end_of(w)
        assert code == 0, output
        runs = json.loads((tmp_path / f"{ranks}-{stage}.json").read_text())["finetune"]["runs"]
        found[ranks, stage] = [run["scores"]["pearson"] for run in runs]
        assert output.count("seed 0, pretrained") == 1, "rank 0 speaks for all"
    assert found[2, 1] == pytest.approx(found[1, None], abs=1e-3)
    assert found[2, 3] == pytest.approx(found[1, None], abs=1e-3)


@pytest.mark.distributed
def test_tasks_in_a_world(exported, tmp_path, deepspeed_json):
    glue = write_glue(tmp_path / "glue")
    words = ["evaluate", exported.folder, "--task", "rte,stsb", "--data", glue, "--seeds", 2]
    words += ["--epochs", 1, "--batch-size", 4, "--max-length", 16, "--device", "cpu"]
    words += ["--results", tmp_path / "results", "--predictions", tmp_path / "predictions"]
    with started("deberta", words, tmp_path / "refused", 2) as running:
        code, output = end_of(running)
    assert code == 2
    assert "2 ranks were started without --deepspeed_config: each would do all" in output
    words += ["--deepspeed_config", deepspeed_json(1, micro=2, precision="bf16")]
    for _ in "ab":
        with started("deberta", words, tmp_path / "world", 2) as running:
            code, output = end_of(running)
        assert code == 0, output
    assert "rte/pretrained-seed-0" not in output, "the second time everything is there"
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert set(results["tasks"]) == {"rte", "stsb"}
    lines = (tmp_path / "predictions" / "pretrained-seed-1" / "RTE.tsv").read_text().splitlines()
    assert len(lines) == 6
