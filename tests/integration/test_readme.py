"""README.md's own commands, run on a small corpus with a tiny model."""

import re
import shlex
import subprocess
import sys

import pytest

from tests.worlds import ROOT, environment

MODULES = {"deberta": "pipeline.cli", "deberta-prep": "data_prep"}
PREPARATION = ("train-tokenizer", "dedup", "build", "verify", "stats")


def block_after(heading):
    """The commands of the first code block under a heading, continuation lines joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split(f"## {heading}\n")[1]
    block = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].replace("\\\n", " ")
    return [line for line in block.splitlines() if line.startswith(tuple(MODULES))]


@pytest.mark.timeout(1200)
def test_from_own_text_to_own_model(
    tmp_path, corpus, tiny_run, deepspeed_json, vocab_size, tmp_path_factory
):
    substitutes = {
        "corpus/": str(corpus),
        "32000": "600",
        "deberta_v3_small": str(tiny_run()),
        "ds_configs/gpu1_bf16.json": str(deepspeed_json(1, 4)),
        "model.vocab_size=32100": f"model.vocab_size={vocab_size}",
        "16": "2",
    }
    for name, start in (("train", 0), ("test", 20)):
        lines = [
            f'{{"text": "sentence number {i}", "label": "{"odd" if i % 2 else "even"}"}}\n'
            for i in range(start, start + 20)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "evaluation").mkdir()
    question = " ".join(f"word{n}" for n in range(20))
    (tmp_path / "evaluation" / "questions.jsonl").write_text(f'{{"text": "{question}"}}\n')
    commands = block_after("From own text to own model on one GPU")
    assert [line.split()[0:2] for line in commands] == [
        *(["deberta-prep", verb] for verb in PREPARATION),
        *(["deberta", verb] for verb in ("train", "train", "export", "evaluate", "evaluate")),
    ]
    for line in commands:
        words = [substitutes.get(word, word) for word in shlex.split(line)]
        # One document a line: eight speeches are too few documents to hold any out.
        extra = ["--txt-document", "line"] if {"dedup", "build"} & set(words) else []
        extra += ["--heldout-fraction", "0.1"] if "build" in words else []
        extra += (
            ["--max-length", "32"] if "--train" in words else []
        )  # the tiny model's limit is 64
        done = subprocess.run(
            [sys.executable, "-m", MODULES[words[0]], *words[1:], *extra],
            capture_output=True,
            text=True,
            env={**environment(), "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    load = block_after_python()
    done = subprocess.run(
        [sys.executable, "-c", load], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr


def block_after_python():
    """The README's Python lines that load the result."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def test_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in set(
        re.findall(r"ds_configs/[\w.]+|pipeline/config\.py|(?:\w+/)*[A-Z_]+\.md", text)
    ):
        assert (ROOT / name).exists(), name
