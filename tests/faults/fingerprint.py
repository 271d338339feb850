"""What a run has computed, to be compared bit for bit with what another has.

Losses and all other figures as hexadecimal floats, weights and moments of the last commit by hash,
the trainer's state, and the samples that every step was given.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

KINDS = ("loss", "figure", "row", "parameters", "optimizer state", "trainer state", "samples")


@dataclass(frozen=True)
class Fingerprint:
    """What a run has computed; equal for two runs that are bit for bit the same."""

    rows: list[dict[str, str]]
    """Rows of metrics.jsonl without times, floats in hexadecimal."""
    tensors: dict[str, str]
    """sha256 of the weights, and of both moments, in every file of the last commit."""
    state: dict[str, Any]
    """The trainer's state in that commit, and Adam's step."""
    samples: dict[str, list[Any]]
    """By rank and step: (epoch, sample) of every sequence, as the step was given them."""

    def differences(self, other: "Fingerprint") -> list[str]:
        """Say in words where two runs differ; empty where they do not."""
        return [text for texts in self.by_kind(other).values() for text in texts]

    def by_kind(self, other: "Fingerprint") -> dict[str, list[str]]:
        """The same by KINDS."""
        found: dict[str, list[str]] = {kind: [] for kind in KINDS}
        for mine, theirs in zip(self.rows, other.rows, strict=False):
            for key in sorted({*mine, *theirs}):
                if mine.get(key) != theirs.get(key):
                    kind = "loss" if key.endswith("_loss") else "figure"
                    text = f"step {mine['step']} {key}: {mine.get(key)} and {theirs.get(key)}"
                    found[kind].append(text)
        if [row["step"] for row in self.rows] != [row["step"] for row in other.rows]:
            found["row"].append(f"{len(self.rows)} rows and {len(other.rows)}")
        for name in sorted({*self.tensors, *other.tensors}):
            if self.tensors.get(name) != other.tensors.get(name):
                kind = "parameters" if name.endswith("weight") else "optimizer state"
                found[kind].append(name)
        if self.state != other.state:
            found["trainer state"].append(f"{self.state} and {other.state}")
        # A run that was begun by another launcher has no record of its first steps.
        for key in sorted({*self.samples} & {*other.samples}):
            if self.samples[key] != other.samples[key]:
                found["samples"].append(key)
        return found


def last_step(run: Path) -> int:
    """Step of the last whole row of a run; -1 where there is none."""
    try:
        text = (run / "metrics.jsonl").read_text()
    except OSError:
        return -1
    lines = text.rpartition("\n")[0].splitlines()
    return json.loads(lines[-1])["step"] if lines else -1


def fingerprint(run: Path) -> Fingerprint:
    """Collect what a run has computed."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [
        {key: _hex(value) for key, value in json.loads(line).items() if key[:5] != "perf/"}
        for line in lines
    ]
    commit = max((run / "checkpoints").glob("step-????????"))
    train_state = json.loads((commit / "train_state.json").read_text())
    state = {key: train_state[key] for key in ("state", "interval_sums", "networks", "tokens")}
    # An evaluation that the last commit owes is done by the next start, which has no other step to
    # commit; its row is compared.
    del state["state"]["owes_evaluation"]
    return Fingerprint(rows, tensors_of(commit), state, consumed_samples(run))


def tensors_of(commit: Path) -> dict[str, str]:
    """By file and kind of slice: sha256 of all of its numbers."""
    digests: dict[str, Any] = {}
    for path in sorted(commit.rglob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            kind = f"{path.relative_to(commit)} {name.partition('/')[0]}"
            digest = digests.setdefault(kind, hashlib.sha256())
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def consumed_samples(run: Path) -> dict[str, list[Any]]:
    """What every step was given; where a step was taken again after a kill, the last time."""
    found = {}
    for path in run.parent.glob(f"{run.name}.samples-*"):
        for line in path.read_text().splitlines():
            step, samples = json.loads(line)
            found[f"rank {path.name.rpartition('-')[2]}, step {step}"] = samples
    return found


def _hex(value: Any) -> str:
    return value.hex() if isinstance(value, float) else str(value)
