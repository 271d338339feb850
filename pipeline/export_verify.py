"""Proof that exported repositories are the trained networks: same states, scores and token ids.

    1. expected   hidden states of the trainer's networks and the discriminator's scores on real
                  tokens, padded ones among them, in fp32 and in fp64
    2. reload     transformers loads the repositories in a process of its own (`export_reload`), the
                  head by the class that the repository brings along
    3. judge      no encoder key missing or unexpected, states and scores within 1e-5 and 1e-9,
                  equal ids

In fp32 the networks are those of the commit. In fp64 they are rebuilt from the exported tensors:
training adds E_G + Delta in fp32, and a sum in fp64 would be another table. The same holds for
fp16 and bf16 exports, whose weights are rounded ones.

Letters: B sequences, L sequence length, D hidden size.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer
from pipeline import export_reload
from pipeline.config import RunConfig
from pipeline.hf_layout import Tensors, pair_from_tensors
from pipeline.modeling.pair import NetworkPair, shared_rows
from pipeline.sequences import PAD_ID, SEP_ID, SequenceBatch, SequenceStream

TOLERANCES = {"float32": 1e-5, "float64": 1e-9}
"""Largest distance of states or scores, relative to the largest of them where that is above 1:
rounding grows with the numbers. States of the demo reach 5; both sides are 1e-5 from their fp64
values."""
AUTO_CLASSES = {"discriminator": "AutoModel", "generator": "AutoModelForMaskedLM"}
_RTD_CLASS = "AutoModelForPreTraining"
KINDS = {"states": "hidden states", "scores": "replacement scores"}
# What transformers' classes have no place for: our heads and the decoder's positions.
_EXPECTED_LEFTOVERS = re.compile(
    r"mask_predictions\.|lm_predictions\.|(deberta\.)?embeddings\.position_embeddings\."
)
_SEQUENCES = 4
_STDERR_CHARACTERS = 2000
PROBE_TEXTS = (
    "The generator guesses, the discriminator decides.",
    "  leading, trailing   and\tinner\nwhite space  ",
    "ligatures \ufb01ne \ufb02ow o\ufb03ce",
    "full-width \uff26\uff35\uff2c\uff2c \uff11\uff12\uff13 \u3000 space",
    "no-break\u00a0space, thin\u2009space, zero\u200bwidth, soft\u00adhyphen",
    "emoji \U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "CJK \u6df1\u5ea6\u5b66\u4e60 \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4",
    "caf\u00e9 na\u00efve \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "1,234.5 km\u00b2 \u00bd \u2122 \u20ac99 (e.g. x_i != y^2)",
)
"""Texts on which a tokenizer that lost its normalization or its byte fallback would differ; none is
of a class in which a tokenizer.json must differ. `deberta-prep verify` compares on the corpus."""


@dataclass(frozen=True)
class Parity:
    """How close a reloaded network is to the trainer's."""

    network: str
    kind: str
    """Of `KINDS`."""
    dtype: str
    max_difference: float
    tolerance: float


@dataclass(frozen=True)
class Verification:
    """What the clean process found; everything within its tolerance."""

    parities: tuple[Parity, ...]
    tokens: int
    """Tokens whose hidden states were compared, padding left out."""
    texts: int
    """Texts whose token ids were compared."""
    ties: int
    """Texts segmented differently with the same score: SentencePiece's ties are arbitrary."""
    versions: dict[str, str]
    """torch and transformers of the clean process."""

    def to_dict(self) -> dict[str, Any]:
        """Convert for JSON.

        Returns:
            Plain values.
        """
        return asdict(self)


def probe_batches(stream: SequenceStream) -> list[SequenceBatch]:
    """Read sequences to compare on: whole ones, and some cut to different lengths and padded.

    Args:
        stream: A split with at least one sequence.

    Returns:
        Two batches on the host; the second is padded.
    """
    samples = np.arange(min(_SEQUENCES, stream.num_sequences), dtype=np.int64)
    whole = stream.batch(samples, np.zeros_like(samples))
    ids_BL, lengths_B = whole.input_ids_BL.clone(), whole.lengths_B.clone()
    for row in range(len(samples)):
        lengths_B[row] = max(3, int(lengths_B[row]) * (row + 1) // (_SEQUENCES + 1))
        ids_BL[row, lengths_B[row] - 1] = SEP_ID
        ids_BL[row, lengths_B[row] :] = PAD_ID
    return [whole, SequenceBatch(ids_BL, lengths_B, whole.sample_words_B2, is_full=False)]


@torch.no_grad()
def trained_outputs(pair: NetworkPair, batch: SequenceBatch) -> dict[tuple[str, str], torch.Tensor]:
    """Compute what exported networks must reproduce.

    Args:
        pair: On the CPU.
        batch: On the host.

    Returns:
        By network and kind: states [B, L, D], and the discriminator's scores [B, L].
    """
    ids_BL, mask_BL = batch.input_ids_BL, batch.attention_mask()
    outputs = {("generator", "states"): pair.generator.encode(ids_BL, mask_BL)}
    if pair.discriminator is not None:
        base_BLE = shared_rows(pair.generator, pair.discriminator, ids_BL)
        states_BLD = pair.discriminator.encode(ids_BL, base_BLE, mask_BL)
        outputs["discriminator", "states"] = states_BLD
        outputs["discriminator", "scores"] = pair.discriminator.mask_predictions(states_BLD)
    return outputs


def verify_export(
    folder: Path,
    pair: NetworkPair,
    tensors: dict[str, Tensors],
    config: RunConfig,
    *,
    stream: SequenceStream,
    tokenizer: Tokenizer,
) -> Verification:
    """Reload both repositories in a clean process and compare them with the trainer's networks.

    Args:
        folder: Holds the repositories.
        pair: The commit's networks in fp32; with fp16 or bf16 tensors, rebuilt from those.
        tensors: What the repositories hold.
        config: The run.
        stream: Real sequences.
        tokenizer: What made them.

    Returns:
        Distances, all within their tolerances.

    Raises:
        UserError: Something differs; the message says what.
    """
    batches = probe_batches(stream)
    with tempfile.TemporaryDirectory(prefix="deberta-export-") as name:
        request = Path(name)
        scales = _write_request(request, folder, pair, tensors, config, batches)
        answer = _reload(request)
    for network in tensors:
        _check_keys(network, answer[network])
    parities = []
    for (network, kind, dtype), largest in scales.items():
        allowed = TOLERANCES[dtype] * max(1.0, largest)
        found = answer[network][f"{kind}_{dtype}"]
        parities.append(Parity(network, kind, dtype, found, allowed))
    for parity in parities:
        # Written so that NaN fails.
        if not parity.max_difference <= parity.tolerance:
            raise UserError(
                f"the exported {parity.network} is not the trained one: {KINDS[parity.kind]} "
                f"of transformers differ by {parity.max_difference:.3g} in {parity.dtype} (allowed "
                f"{parity.tolerance:.3g}); nothing was exported"
            )
    ties = max(_count_ties(network, answer[network], tokenizer) for network in tensors)
    tokens = sum(int(batch.lengths_B.sum()) for batch in batches)
    return Verification(tuple(parities), tokens, len(PROBE_TEXTS), ties, answer["versions"])


def _write_request(
    request: Path,
    folder: Path,
    pair: NetworkPair,
    tensors: dict[str, Tensors],
    config: RunConfig,
    batches: Sequence[SequenceBatch],
) -> dict[tuple[str, str, str], float]:
    """Write the request; returns the largest number by network, kind and dtype."""
    expected: dict[str, Tensors] = {name: {} for name in tensors}
    scales: dict[tuple[str, str, str], float] = {}
    for dtype in TOLERANCES:
        if dtype == "float64":
            pair = pair_from_tensors(config, tensors, torch.float64)
        for number, batch in enumerate(batches):
            mask_BL = batch.attention_mask()
            if mask_BL is None:
                mask_BL = torch.ones_like(batch.input_ids_BL, dtype=torch.bool)
            for (name, kind), output in trained_outputs(pair, batch).items():
                largest = float(output[mask_BL].abs().max())
                scales[name, kind, dtype] = max(scales.get((name, kind, dtype), 0.0), largest)
                expected[name][f"{kind}_{dtype}_{number}"] = output
                expected[name][f"ids_{number}"] = batch.input_ids_BL
                expected[name][f"mask_{number}"] = mask_BL
    for name in tensors:
        save_file(expected[name], request / f"{name}.safetensors")
    repositories = {
        name: {"folder": str(folder.resolve() / name), "auto_class": AUTO_CLASSES[name]}
        for name in tensors
    }
    if "discriminator" in repositories:
        repositories["discriminator"]["rtd_class"] = _RTD_CLASS
    content = json.dumps({"texts": PROBE_TEXTS, "repositories": repositories})
    (request / "request.json").write_text(content, encoding="utf-8")
    return scales


def _reload(request: Path) -> dict[str, Any]:
    """Run the clean process and read its answer."""
    # -P: the program's folder holds our modules, whose names must not hide anybody's.
    command = [sys.executable, "-P", export_reload.__file__, str(request)]
    # transformers copies a repository's code before it runs it; here, not into the user's cache.
    environment = {**os.environ, "HF_MODULES_CACHE": str(request / "modules")}
    done = subprocess.run(
        command, cwd=request, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(
            "transformers cannot reload the exported repositories; nothing was exported. Its "
            f"process ended with code {done.returncode}:\n{done.stderr[-_STDERR_CHARACTERS:]}"
        )
    return json.loads((request / "answer.json").read_text(encoding="utf-8"))


def _check_keys(network: str, answer: dict[str, Any]) -> None:
    """Refuse a repository that transformers would load in part."""
    strangers = [k for k in answer["unexpected_keys"] if not _EXPECTED_LEFTOVERS.match(k)]
    if answer["missing_keys"] or strangers:
        raise UserError(
            f"transformers does not find the {network}'s weights: missing "
            f"{answer['missing_keys']}, unexpected {strangers}; nothing was exported"
        )


def _count_ties(network: str, answer: dict[str, Any], tokenizer: Tokenizer) -> int:
    """Compare token ids with SentencePiece's; returns how many differ by a tie."""
    ties = 0
    for text, found in zip(PROBE_TEXTS, answer["token_ids"], strict=True):
        expected = tokenizer.encode(text)
        if found == [tokenizer.cls_id, *expected, tokenizer.sep_id]:
            continue
        if not _is_tie(tokenizer, expected, found[1:-1]):
            raise UserError(
                f"the exported {network}'s tokenizer.json gives other ids than spm.model on "
                f"{text[:80]!a}; nothing was exported. Build the dataset again"
            )
        ties += 1
    return ties


def _is_tie(tokenizer: Tokenizer, first: list[int], second: list[int]) -> bool:
    """Tell whether two segmentations spell the same and score the same within fp32 rounding."""
    spellings = ["".join(tokenizer.pieces(ids)) for ids in (first, second)]
    scores = [math.fsum(tokenizer.scores(ids)) for ids in (first, second)]
    rounding = abs(scores[0]) * len(first) * 2.0**-24
    return spellings[0] == spellings[1] and abs(scores[0] - scores[1]) <= rounding
