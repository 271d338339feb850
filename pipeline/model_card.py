"""The README.md of an exported repository: what it is, what it was trained on, how to load it.

    ExportFacts    what the card tells, gathered by `pipeline.export`
    model_card     front matter by huggingface_hub, then Markdown

The licence is left to the user: weights inherit duties from the text, which only they know.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from pipeline.config import RunConfig

_PAPER = "https://arxiv.org/abs/2111.09543"

_DISCRIMINATOR = """\
# DeBERTaV3 discriminator

The encoder for downstream tasks, pre-trained by replaced token detection with gradient-disentangled
embedding sharing ([DeBERTaV3]({paper})). Its word embeddings are the merged table E_G + Delta.

```python
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("PATH/discriminator")
model = AutoModel.from_pretrained("PATH/discriminator")
```

The weights `mask_predictions.*` are the head that tells replaced tokens from original ones,
`w . GELU(W LayerNorm(h_CLS + h_i) + b) + c`. No class of transformers holds it: `AutoModel` reports
its six tensors as unexpected and leaves them out, as it does with the released models.
"""

_GENERATOR = """\
# DeBERTaV3 generator

The masked language model that proposed the replacements in [DeBERTaV3]({paper}) pre-training. The
repository beside it, `discriminator`, is the one for downstream tasks.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("PATH/generator")
model = AutoModelForMaskedLM.from_pretrained("PATH/generator")
```

**Fill-mask predictions of this class are not the trained ones.** The generator predicts through an
enhanced mask decoder: the last layer is applied twice, to queries that start as the states of the
layer before plus `position_embeddings`. transformers has no such decoder: it leaves the position
table out and applies the head to the last layer's states. The encoder is the trained one. For the
trained predictions use `pipeline.modeling.networks.Generator`; `load_pretrained` of
`pipeline.evaluate.load` builds it from this folder and its sister `discriminator`.
"""

_TRAINING = """
## Training

| | |
|---|---|
| optimizer steps | {step:,} |
| tokens seen | {tokens:,} ({tokens_per_step:,} a step) |
| sequence length | {length} |
| parameters here | {parameters:,} |
| stored as | {dtype} |
| dataset fingerprint (sha256 of its manifest) | `{dataset_fingerprint}` |
| tokenizer fingerprint (sha256 of spm.model) | `{tokenizer_fingerprint}` |
| trained with | {versions} |

`pretraining_config.json` holds the whole configuration. It repeats the run on the same dataset:

```
deberta train --config pretraining_config.json --deepspeed_config pretraining_config.json \\
    data.path=DATASET run.folder=RUN
deberta export RUN OUTPUT
```
"""


@dataclass(frozen=True)
class ExportFacts:
    """What a card tells of an export."""

    config: RunConfig
    step: int
    tokens_per_step: int
    dtype: str
    dataset_fingerprint: str
    tokenizer_fingerprint: str
    versions: dict[str, str]
    """Package -> version, of the training."""
    heldout: dict[str, Any] | None
    """The row of metrics.jsonl with the newest held-out figures up to this step."""


def heldout_row(metrics: Path, step: int) -> dict[str, Any] | None:
    """Find the newest held-out figures that are not newer than a commit.

    Args:
        metrics: The run's metrics.jsonl, which may be absent.
        step: Step of the commit.

    Returns:
        The row, with its "step"; None where there is none.
    """
    if not metrics.is_file():
        return None
    newest = None
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a run that still writes
            continue
        if row.get("step", step + 1) <= step and any(key.startswith("eval/") for key in row):
            newest = row
    return newest


def model_card(network: str, facts: ExportFacts, parameters: int) -> str:
    """Write the card of one repository.

    Args:
        network: "discriminator" or "generator".
        facts: What it tells.
        parameters: Parameters in the repository.

    Returns:
        Text of README.md.
    """
    data = ModelCardData(
        library_name="transformers",
        license="other",
        tags=["deberta-v3", "replaced-token-detection", network],
        # Without a pipeline tag the hub would offer the generator for fill-mask.
        pipeline_tag="feature-extraction",
    )
    head = _DISCRIMINATOR if network == "discriminator" else _GENERATOR
    text = head.format(paper=_PAPER) + _TRAINING.format(
        step=facts.step,
        tokens=facts.step * facts.tokens_per_step,
        tokens_per_step=facts.tokens_per_step,
        length=facts.config.data.sequence_length,
        parameters=parameters,
        dtype=facts.dtype,
        dataset_fingerprint=facts.dataset_fingerprint,
        tokenizer_fingerprint=facts.tokenizer_fingerprint,
        versions=", ".join(f"{name} {version}" for name, version in facts.versions.items()),
    )
    text += _heldout_section(facts.heldout)
    text += "\n## Licence\n\nNot chosen yet. Set `license` above to one that fits the text.\n"
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _heldout_section(row: dict[str, Any] | None) -> str:
    """Tabulate held-out figures."""
    if row is None:
        return "\n## Held-out figures\n\nNone were measured up to this step.\n"
    # A figure that was not finite is null.
    names = [name for name, value in row.items() if name.startswith("eval/") and value is not None]
    figures = {name.removeprefix("eval/"): row[name] for name in names}
    lines = [f"| {name} | {value:.4f} |" for name, value in figures.items()]
    return (
        f"\n## Held-out figures\n\nAt step {row['step']:,}, without dropout; losses in nats.\n\n"
        "| figure | value |\n|---|---|\n" + "\n".join(lines) + "\n"
    )
