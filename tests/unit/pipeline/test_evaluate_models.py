"""Held-out figures and fine-tuning of a model, whatever it was named by."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.errors import CorruptError, UserError
from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer
from pipeline.commands_evaluate import evaluate_command
from pipeline.evaluate import figures
from pipeline.evaluate.finetune import FinetuneOptions, finetune
from pipeline.evaluate.heldout_model import choose_device, evaluate_heldout_model
from pipeline.evaluate.load import encoder_repository, load_pretrained
from tests.commits import flip_a_byte


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    """Intervals cost a second a figure; whether they are right is a test of figures."""
    monkeypatch.setattr(figures, "NUM_DRAWS", 50)


OPTIONS = FinetuneOptions(seeds=2, epochs=6, learning_rate=3e-3, batch_size=8, max_length=16)


def heldout(model, dataset, **options):
    return evaluate_heldout_model(model, dataset, device="cpu", **options)


def test_run_commit_and_export_have_the_same_figures(random_run, exported, dataset_folder):
    reports = [
        heldout(model, dataset_folder)
        for model in (
            random_run.folder,
            random_run.commit,
            exported.folder,
            exported.folder / "discriminator",
            exported.folder / "generator",
        )
    ]
    assert {report.step for report in reports} == {40}
    assert {report.sequences for report in reports} == {8}
    first = reports[0].figures
    assert set(first) == {
        "eval/mlm_loss",
        "eval/mlm_accuracy",
        "eval/rtd_loss",
        "eval/rtd_accuracy_replaced",
        "eval/rtd_accuracy_original",
        "eval/replaced_fraction",
        "eval/rtd_auc",
    }
    assert reports[1].figures == first
    for report in reports[2:]:
        assert report.figures == pytest.approx(first, rel=1e-5)


def test_heldout_mlm_loss_by_hand(random_run, dataset_folder):
    """The first sequence's loss from whole logits, with the masks of the run's seed."""
    from pipeline.masking import MaskingVocabulary
    from pipeline.objective_keys import ObjectiveKeys
    from pipeline.sequences import SequenceStream

    generator, config = random_run.pair.generator, random_run.config
    dataset = Dataset.open(dataset_folder)
    vocabulary = MaskingVocabulary.from_tokenizer(Tokenizer.load(dataset_folder / "tokenizer"))
    one = np.zeros(1, dtype=np.int64)
    batch = SequenceStream(dataset, "heldout", 40).batch(one, one)
    slots = ObjectiveKeys(config.objective, 5, 40, vocabulary, "heldout").mask(batch)
    embeddings, head = generator.deberta.embeddings, generator.lm_predictions.lm_head
    with torch.no_grad():
        decoded = generator.deberta.encoder.decode(
            embeddings(slots.masked_ids_BL, None, None),
            None,
            None,
            slots.positions_BK,
            embeddings.position_embeddings(slots.positions_BK),
        )
        states = head.LayerNorm(torch.nn.functional.gelu(head.dense(decoded)))
        logits = states @ embeddings.word_embeddings.weight.T + head.bias
        loss = torch.nn.functional.cross_entropy(logits[0], slots.targets_BK[0])
    report = heldout(random_run.folder, dataset_folder, max_sequences=1, batch_size=1)
    assert report.figures["eval/mlm_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_models_that_are_none(exported, random_run, dataset_folder, tmp_path):
    with pytest.raises(UserError, match="neither a run folder with a checkpoint nor"):
        load_pretrained(tmp_path)
    shutil.copytree(exported.folder / "discriminator", tmp_path / "discriminator")
    with pytest.raises(UserError, match=r"generator is missing: held-out figures and .* side by"):
        load_pretrained(tmp_path / "discriminator")
    shutil.copytree(exported.folder / "generator", tmp_path / "generator")
    path = tmp_path / "discriminator" / "pretraining_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "export"}))
    with pytest.raises(UserError, match=r"the block `export` is missing; export the run again"):
        load_pretrained(tmp_path)
    shutil.copytree(random_run.commit, tmp_path / "step-00000040")
    flip_a_byte(tmp_path / "step-00000040" / "discriminator" / "rank-00000.safetensors")
    with pytest.raises(CorruptError, match=r"rank-00000\.safetensors: sha256"):
        load_pretrained(tmp_path / "step-00000040")


def test_encoder_repository(random_run, exported, tmp_path):
    with encoder_repository(exported.folder) as folder:
        assert folder == exported.folder / "discriminator"
    with encoder_repository(exported.folder / "generator") as folder:
        assert folder == exported.folder / "generator"
    (tmp_path / "config.json").write_text("{}")
    with (
        pytest.raises(UserError, match=r"spm.model is missing: text cannot be tokenized without"),
        encoder_repository(tmp_path),
    ):
        pass
    with encoder_repository(random_run.commit) as folder:
        assert (folder / "model.safetensors").is_file()
    assert not folder.exists()


def test_dataset_must_fit(random_run, dataset_folder, monkeypatch):
    with pytest.raises(UserError, match=r"tokenizer: no manifest.json in it"):
        heldout(random_run.folder, dataset_folder / "tokenizer")
    monkeypatch.setattr(Dataset, "split_tokens", lambda self, split: 0)
    with pytest.raises(UserError, match="holds nothing out: build it with"):
        heldout(random_run.folder, dataset_folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there():
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match=r"--device cuda: torch finds no GPU"):
        choose_device("cuda")


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A task that a tiny encoder learns: does a text begin with "war" or with "peace"?"""
    folder = tmp_path_factory.mktemp("classes")
    for name, count in (("train", 64), ("test", 20)):
        words = [("war", "peace")[i % 2] for i in range(count)]
        rows = [{"text": f"{w} {i} years", "label": w} for i, w in enumerate(words)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "train.jsonl", folder / "test.jsonl"


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """Sentences in which "people" is a span of two tokens with what follows."""
    folder = tmp_path_factory.mktemp("tagged")
    for name, first, last in (("train", 0, 64), ("test", 500, 512)):
        lines = []
        for i in range(first, last):
            lines += ["we O", "the O"] * (i % 3) + ["people B-P", f"{i} I-P", "hope O", ""]
        (folder / f"{name}.conll").write_text("\n".join(lines) + "\n")
    return folder / "train.conll", folder / "test.conll"


def test_finetuning_learns_and_repeats_itself(exported, classes):
    said = []
    reports = [finetune(exported.folder, *classes, options=OPTIONS, say=said.append) for _ in "ab"]
    assert reports[0] == reports[1]
    report = reports[0]
    assert [(run.start, run.seed) for run in report.runs] == [
        ("pretrained", 0),
        ("random", 0),
        ("pretrained", 1),
        ("random", 1),
    ]
    assert len(said) == 8
    assert said[0].startswith("seed 0, pretrained: accuracy ")
    assert report.baselines["majority class"]["accuracy"] == 0.5
    accuracies = [run.scores["accuracy"] for run in report.runs if run.start == "pretrained"]
    assert min(accuracies) > 0.85
    summary = report.summary()["pretrained"]["accuracy"]
    assert summary["mean"] == pytest.approx(np.mean(accuracies))
    assert summary["std"] == pytest.approx(np.std(accuracies, ddof=1))
    random_state = torch.get_rng_state()
    finetune(exported.folder, *classes, options=FinetuneOptions(1, 1, max_train=8, max_length=16))
    assert torch.equal(torch.get_rng_state(), random_state), "the caller's numbers are left alone"


def test_starts_differ_in_the_encoder_alone(exported):
    from pipeline.evaluate.heads import build_model

    head = "AutoModelForSequenceClassification"
    models = {
        start: build_model(exported.folder / "discriminator", start, head, 2)
        for start in ("pretrained", "random")
    }
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in models.values()]
    assert shapes[0] == shapes[1]
    table = "deberta.embeddings.word_embeddings.weight"
    stored = {n: p for n, p in models["pretrained"].named_parameters()}[table]
    drawn = {n: p for n, p in models["random"].named_parameters()}[table]
    assert stored.std() > 0.3  # as written by the test's run
    assert 0.01 < drawn.std() < 0.03  # initializer_range


def test_default_learning_rate(exported, classes):
    options = FinetuneOptions(1, 1, max_train=8, max_length=16)
    report = finetune(exported.folder, *classes, options=options)
    assert report.learning_rate == pytest.approx(0.2 / (3 * 24))


def test_seeds_may_be_shared_among_processes(exported, classes):
    def runs(**changes):
        options = FinetuneOptions(**{"epochs": 1, "max_train": 8, "max_length": 16, **changes})
        return finetune(exported.folder, *classes, options=options).runs

    assert runs(seeds=2) == runs(seeds=1) + runs(seeds=1, first_seed=1)


def test_shards_of_own_files_become_one_table(exported, classes, tmp_path, capsys):
    """As an array of jobs shares them; the same command again trains nothing."""
    arguments = {"train": classes[0], "test": classes[1], "seeds": 3, "epochs": 1, "max_train": 8}
    arguments |= {"max_length": 16, "device": "cpu", "learning_rate": 1e-3}
    shared = {**arguments, "results": tmp_path / "results"}
    for part in (1, 0):
        evaluate_command(exported.folder, **shared, shard=f"{part}/2")
    first = capsys.readouterr()
    assert "2 of 6 runs are finished; the others are of other shards" in first.err
    (row,) = (line for line in first.out.splitlines() if "pre-trained" in line)
    assert (row.count("+-"), row.count("..")) == (2, 2), "the last prints the table, row by row"
    merged = json.loads((tmp_path / "results" / "results.json").read_text())
    evaluate_command(exported.folder, **shared, as_json=True)
    last = capsys.readouterr()
    assert "seed" not in last.err
    assert json.loads(last.out)["finetune"] == merged
    evaluate_command(exported.folder, **arguments, as_json=True)
    alone = json.loads(capsys.readouterr().out)["finetune"]
    for key in ("runs", "summary", "intervals", "baselines"):
        assert merged[key] == alone[key], key
    assert [run["seed"] for run in merged["runs"]] == [0, 0, 1, 1, 2, 2]
    low, high = merged["intervals"]["pretrained"]["accuracy"]
    assert low < merged["summary"]["pretrained"]["accuracy"]["mean"] < high
    with pytest.raises(UserError, match=r"is of other settings: epochs 1 there, 2 now"):
        evaluate_command(exported.folder, **{**shared, "epochs": 2})
    with pytest.raises(UserError, match=r"--shard needs --results FOLDER"):
        evaluate_command(exported.folder, **arguments, shard="0/2")


def test_command_with_everything(exported, dataset_folder, tagged, tmp_path, capsys):
    arguments = {
        "train": tagged[0],
        "test": tagged[1],
        "seeds": 1,
        "epochs": 8,
        "learning_rate": 5e-3,
        "max_length": 24,
        "device": "cpu",
    }
    output = tmp_path / "result.json"
    evaluate_command(
        exported.folder, dataset=dataset_folder, output=output, as_json=True, **arguments
    )
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert json.loads(output.read_text()) == values
    assert "seed 0, random:" in printed.err
    assert values["heldout"]["figures"]["eval/mlm_loss"] > 0
    result = values["finetune"]
    assert result["kind"] == "tagging"
    assert result["labels"] == ["B-P", "I-P", "O"]
    assert (result["train_examples"], result["test_examples"]) == (64, 12)
    assert result["summary"]["pretrained"]["span_f1"]["mean"] > 0.8
    assert result["baselines"]["most frequent tag of the word"]["span_f1"] < 1.0
    evaluate_command(exported.folder, dataset=dataset_folder, **arguments)
    table = capsys.readouterr().out
    for word in ("eval/rtd_auc", "pre-trained", "random start", "most frequent", "span_f1", "+-"):
        assert word in table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, r"--seeds 0: give 1 or more"),
        ({"first_seed": -1}, r"--first-seed -1: give 0 or more"),
        ({"epochs": 0}, r"--epochs 0: give 1"),
        ({"max_train": 1}, r"--max-train 1: give 2"),
        ({"max_length": 4}, r"--max-length 4: give 8"),
        ({"max_length": 64}, r"--max-length 64: the model takes at most 48 tokens"),
        ({"learning_rate": 0.0}, r"--learning-rate 0.0: give a number in \(0, 1\)"),
        ({"learning_rate": float("nan")}, r"--learning-rate nan"),
    ],
)
def test_bad_options(exported, classes, changes, message):
    with pytest.raises(UserError, match=message):
        finetune(exported.folder, *classes, options=FinetuneOptions(**{"seeds": 1, **changes}))


def test_divergence_is_said(exported, classes, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(exported.folder / "discriminator", repository)
    tensors = load_file(repository / "model.safetensors")
    tensors["deberta.encoder.layer.2.output.LayerNorm.weight"][:] = 3e38
    save_file(tensors, repository / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"diverged in step 1: give a lower --learning-rate than 0"):
        finetune(repository, *classes, options=FinetuneOptions(1, 1, max_length=16))


def test_bad_command_lines(exported, classes, tmp_path):
    with pytest.raises(UserError, match=r"nothing to measure: give --dataset DATASET"):
        evaluate_command(exported.folder)
    with pytest.raises(UserError, match=r"--train and --test go together"):
        evaluate_command(exported.folder, train=classes[0])
    with pytest.raises(UserError, match=r"--output .*nowhere.x.json: .*nowhere is no folder"):
        evaluate_command(
            exported.folder, train=classes[0], test=classes[1], output=tmp_path / "nowhere/x.json"
        )
