"""The README.md of an exported repository: what it is, what it was trained on, how to load it.

    ExportFacts    what the card tells, gathered by `pipeline.export`
    model_card     front matter by huggingface_hub, then Markdown

The licence is the user's to say: weights inherit duties from the text, which only they know.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from pipeline.config import RunConfig
from pipeline.energy import RunCost, board_watts
from pipeline.hf_layout import ExportDtype
from pipeline.report.history import RunHistory

CURVES = "curves.png"
"""Picture of the run's losses, beside the card."""
_PAPER = "https://arxiv.org/abs/2111.09543"

_DISCRIMINATOR = """\
# {family} discriminator

The encoder for downstream tasks, pre-trained by replaced token detection ([paper]({paper})). Its
word embeddings are {embeddings}.

```python
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("PATH/discriminator")
model = AutoModel.from_pretrained("PATH/discriminator")
```

The weights `mask_predictions.*` are the head that tells replaced tokens from original ones,
`{head}`. No class of transformers holds it: `AutoModel` reports its tensors as unexpected and
leaves them out, as it does with the released models. The class in `modeling_rtd.py` uses it; read
the file before you trust it:

```python
from transformers import AutoModelForPreTraining
model = AutoModelForPreTraining.from_pretrained("PATH/discriminator", trust_remote_code=True)
for token, probability in model.score_text(tokenizer, "The chef ate the meal he had cooked."):
    print(f"{{probability:.3f}} {{token}}")
```
"""

_GENERATOR = """\
# {family} generator

The masked language model that proposed the replacements in pre-training by replaced token detection
([paper]({paper})). The repository beside it, `discriminator`, is the one for downstream tasks.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("PATH/generator")
model = AutoModelForMaskedLM.from_pretrained("PATH/generator")
```
"""

_MASKED_LM = """\
# {family}, a masked language model

```python
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("PATH/generator")
model = AutoModel.from_pretrained("PATH/generator")
```
"""

_MASK_DECODER = """
**Fill-mask predictions of this class are not the trained ones.** The generator predicts through an
enhanced mask decoder: the last layer is applied twice, to queries that start as the states of the
layer before plus `position_embeddings`. transformers has no such decoder: it leaves the position
table out and applies the head to the last layer's states. The encoder is the trained one. For the
trained predictions use `pipeline.modeling.networks.Generator`; `load_pretrained` of
`pipeline.evaluate.load` builds it from this folder and those beside it.
"""

_EMBEDDINGS = {
    "gdes": "the merged table E_G + Delta of gradient-disentangled embedding sharing",
    "es": "the generator's, shared in training",
    "nes": "its own",
}
_HEADS = {
    "debertav3": "w . GELU(W LayerNorm(h_CLS + h_i) + b) + c",
    "electra": "w . GELU(W h_i + b) + c",
}

_TRAINING = """
## Training

| | |
|---|---|
| optimizer steps | {step} |
| tokens seen | {tokens:,} |
| sequence length | {length} |
| parameters here | {parameters:,} |
| stored as | {dtype} |
| computed on | {hardware} |
| energy | {energy} |
| dataset fingerprint (sha256 of its manifest) | `{dataset_fingerprint}` |
| dataset made by | `{dataset_command}` |
| tokenizer fingerprint (sha256 of spm.model) | `{tokenizer_fingerprint}` |
| trained with | {versions} |

`pretraining_config.json` holds the whole configuration. It repeats the run on the same dataset:

```
deberta train --config pretraining_config.json --deepspeed_config pretraining_config.json \\
    data.path=DATASET run.folder=RUN
deberta export RUN OUTPUT
```
"""


_CURVES_SECTION = f"""
## Curves

![Losses, accuracies and learning rates over the optimizer steps]({CURVES})
"""


@dataclass(frozen=True)
class ExportFacts:
    """What a card tells of an export."""

    config: RunConfig
    step: int
    tokens: int
    """Of all steps, padding included."""
    averaged_steps: tuple[int, ...]
    """Steps of the commits whose mean this is; nothing where it is one commit."""
    dtype: ExportDtype
    dataset_fingerprint: str
    tokenizer_fingerprint: str
    dataset_command: str
    """That built the dataset."""
    versions: dict[str, str]
    """Package -> version, of the training."""
    cost: RunCost | None
    """None where the rows of the run are not at hand."""
    licence: str
    """Identifier of the hub, such as "mit"; empty where the user has not said."""
    history: RunHistory | None
    """Of the run up to this step, whose curves lie beside the card; None where not at hand."""
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
        license=facts.licence or "other",
        tags=[_family(facts.config).lower(), *_task_tags(facts.config, network)],
        # Without a pipeline tag the hub would offer the generator for fill-mask.
        pipeline_tag="feature-extraction",
    )
    text = _head(network, facts.config) + _TRAINING.format(
        step=_steps(facts),
        tokens=facts.tokens,
        length=facts.config.data.sequence_length,
        parameters=parameters,
        dtype=facts.dtype,
        dataset_fingerprint=facts.dataset_fingerprint,
        tokenizer_fingerprint=facts.tokenizer_fingerprint,
        versions=", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        dataset_command=facts.dataset_command.replace("|", "\\|"),
        hardware=_hardware(facts.cost),
        energy=_energy(facts.cost),
    )
    text += _CURVES_SECTION if facts.history else ""
    text += _heldout_section(facts.heldout, bool(facts.averaged_steps))
    unknown = "Not chosen yet. Set `license` above to one that fits the text."
    text += f"\n## Licence\n\n{facts.licence or unknown}\n"
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _steps(facts: ExportFacts) -> str:
    """Say how far the weights were trained."""
    if not facts.averaged_steps:
        return f"{facts.step:,}"
    steps = ", ".join(f"{step:,}" for step in sorted(facts.averaged_steps))
    return f"{facts.step:,}; the weights are the mean of those after {steps} steps"


def _hardware(cost: RunCost | None) -> str:
    """Say on what and how long it was computed."""
    if cost is None:
        return "not known: the rows of the run were not at hand"
    return f"{cost.devices} x {cost.device}, {cost.hours:,.3g} hours in the steps that count"


def _energy(cost: RunCost | None) -> str:
    """Estimate what the devices took."""
    if cost is None or (energy := cost.kilowatt_hours) is None:
        return "not estimated: the power of the device is not known"
    watts = board_watts(cost.device)
    return (
        f"about {energy:,.3g} kWh: {cost.device_hours:,.3g} device-hours at the board's {watts} W; "
        "hosts, network and cooling are not in it"
    )


def _head(network: str, config: RunConfig) -> str:
    """Say what the repository is."""
    objective = config.objective
    template = _DISCRIMINATOR if network == "discriminator" else _GENERATOR
    text = (_MASKED_LM if objective.task == "mlm" else template).format(
        family=_family(config),
        paper=_PAPER,
        embeddings=_EMBEDDINGS[objective.embedding_sharing],
        head=_HEADS[objective.rtd_head],
    )
    has_decoder = network == "generator" and objective.enhanced_mask_decoder
    return text + (_MASK_DECODER if has_decoder else "")


def _family(config: RunConfig) -> str:
    """Name the kind of model by what tells the papers' systems apart."""
    if not config.generator.relative_attention:
        return "BERT" if config.objective.task == "mlm" else "ELECTRA"
    return "DeBERTa" if config.objective.task == "mlm" else "DeBERTa-v3"


def _task_tags(config: RunConfig, network: str) -> tuple[str, ...]:
    if config.objective.task == "mlm":
        return ("masked-language-modelling",)
    return ("replaced-token-detection", network)


def _heldout_section(row: dict[str, Any] | None, is_averaged: bool) -> str:
    """Tabulate held-out figures."""
    if row is None:
        return "\n## Held-out figures\n\nNone were measured up to this step.\n"
    # A figure that was not finite is null.
    names = [name for name, value in row.items() if name.startswith("eval/") and value is not None]
    figures = {name.removeprefix("eval/"): row[name] for name in names}
    lines = [f"| {name} | {value:.4f} |" for name, value in figures.items()]
    whose = " of the newest of the averaged checkpoints" if is_averaged else ""
    return (
        f"\n## Held-out figures\n\nAt step {row['step']:,}{whose}, without dropout; losses in "
        "nats.\n\n"
        "| figure | value |\n|---|---|\n" + "\n".join(lines) + "\n"
    )
