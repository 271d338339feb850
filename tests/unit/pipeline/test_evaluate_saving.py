"""Fine-tuned models that are kept: transformers loads what was scored."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from data_prep.errors import UserError
from pipeline.commands_evaluate import evaluate_command
from pipeline.evaluate.finetune import FinetuneOptions, finetune


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Does a text begin with "war" or with "peace"?"""
    folder = tmp_path_factory.mktemp("classes")
    for name, count in (("train", 32), ("test", 10)):
        words = [("war", "peace")[i % 2] for i in range(count)]
        rows = [{"text": f"{w} {i} years", "label": w} for i, w in enumerate(words)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "train.jsonl", folder / "test.jsonl"


def test_what_is_kept_is_what_was_scored(exported, classes, tmp_path):
    options = FinetuneOptions(
        seeds=2,
        epochs=1,
        learning_rate=1e-3,
        batch_size=8,
        max_length=16,
        starts=("pretrained",),
        save=str(tmp_path / "models"),
    )
    report = finetune(exported.folder, *classes, options=options)
    found = sorted(path.name for path in (tmp_path / "models").iterdir())
    assert found == ["pretrained-seed-0", "pretrained-seed-1"]
    rows = [json.loads(line) for line in classes[1].read_text().splitlines()]
    for run in report.runs:
        folder = tmp_path / "models" / f"pretrained-seed-{run.seed}"
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True
        )
        assert info["missing_keys"] == info["unexpected_keys"] == set()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            texts = [row["text"] for row in rows]
            logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        labels = [model.config.id2label[i] for i in logits.argmax(-1).tolist()]
        right = sum(label == row["label"] for label, row in zip(labels, rows, strict=True))
        assert right / len(rows) == run.scores["accuracy"]
        assert model.config.label2id == {"peace": 0, "war": 1}
    with pytest.raises(UserError, match=r"--save .*models is not an empty folder: choose another"):
        finetune(exported.folder, *classes, options=options)


def test_where_nothing_can_be_kept(exported, classes, tmp_path):
    with pytest.raises(UserError, match=r"--save keeps models of --train that one process trained"):
        evaluate_command(exported.folder, task="cola", data="folder", save=tmp_path / "models")
    (tmp_path / "file").write_text("")
    options = FinetuneOptions(1, 1, max_train=8, max_length=16, starts=("pretrained",))
    options = FinetuneOptions(**{**vars(options), "save": str(tmp_path / "file" / "models")})
    with pytest.raises(UserError, match=r"--save .*models.*: cannot be written: "):
        finetune(exported.folder, *classes, options=options)
