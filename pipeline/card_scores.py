"""The evaluation section of a model card: scores of `deberta evaluate`, for people and for the hub.

    read_scores    a file of `deberta evaluate` -> Scores
    add_scores     an export and Scores -> its cards, with the section and the hub's metadata

The hub shows what stands in the card's `model-index`; people read the table. Scores belong to an
export by the fingerprint of its weights, minimal pairs by its step. A card that has the section
gets the new one in its place; all else in it stays.
"""

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from data_prep.errors import UserError
from pipeline.config_files import read_json
from pipeline.evaluate.catalogue import TASKS
from pipeline.evaluate.task_runs import model_digest
from pipeline.export_repositories import PRETRAINING_CONFIG
from pipeline.run_folder import write_durably

_BEGIN, _END = "<!-- evaluation -->", "<!-- end of evaluation -->"
_SECTION = re.compile(rf"{_BEGIN}.*?{_END}\n", re.DOTALL)
_TASK_TYPES = {
    "tagging": "token-classification",
    "span": "question-answering",
    "entity": "question-answering",
    "multiple-choice": "multiple-choice",
}
_METRIC_TYPES = {"spearman": "spearmanr", "token_f1": "f1", "span_f1": "f1", "macro_f1": "f1"}
_STARTS = {"pretrained": "", "random": ", from random weights"}


@dataclass(frozen=True)
class Score:
    """One figure of one task."""

    task: str
    start: str
    figure: str
    by_seed: tuple[float, ...]
    interval: tuple[float, float]
    task_type: str
    """As the hub names it."""
    dataset: tuple[str, str | None, str]
    """Repository on the hub, configuration and split; of own files their names."""


@dataclass(frozen=True)
class Scores:
    """What files of `deberta evaluate` say of a model."""

    scores: tuple[Score, ...] = ()
    pairs: tuple[dict[str, Any], ...] = ()
    """Reports of minimal pairs."""
    commands: tuple[str, ...] = ()
    models: frozenset[str] = field(default_factory=frozenset)
    """Fingerprints of what was fine-tuned."""


def read_scores(paths: Sequence[Path]) -> Scores:
    """Read files of `deberta evaluate`: what --output wrote, or a results.json of --results.

    Args:
        paths: The files.

    Returns:
        All that they hold.

    Raises:
        UserError: A file is none of these.
    """
    scores: list[Score] = []
    pairs: list[dict[str, Any]] = []
    commands: list[str] = []
    models: set[str] = set()
    for path in paths:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            parts = _parts(document)
            found = [*_published(parts.get("tasks")), *_own(parts.get("finetune"))]
            scores += found
            pairs += [parts["minimal_pairs"]] if "minimal_pairs" in parts else []
            for part in (parts.get("tasks"), parts.get("finetune")):
                if part is not None:
                    models.add(part["model_sha256"])
                    commands.append(part["command"])
            if not found and "minimal_pairs" not in parts:
                raise KeyError("tasks")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"--scores {path}: not what `deberta evaluate` wrote with --output, nor a finished "
                f"results.json of --results ({error!r})"
            ) from error
    kept = tuple(dict.fromkeys(command for command in commands if command))
    return Scores(tuple(scores), tuple(pairs), kept, frozenset(models))


def _parts(document: dict[str, Any]) -> dict[str, Any]:
    """Tell the forms apart: a results.json is one part alone."""
    if "averages" in document:
        return {"tasks": document}
    return {"finetune": document} if "runs" in document else document


def _published(part: dict[str, Any] | None) -> Iterator[Score]:
    """Take the figures of published tasks."""
    for name, task in (part["tasks"] if part else {}).items():
        spec = TASKS[name]
        splits = {**spec.scored, **{key: d.split for key, d in spec.diagnostics.items()}}
        repository, config = spec.hub
        for figure in task["figures"]:
            # A group of examples is of the split of all of them.
            split = splits.get(figure["part"], next(iter(spec.scored.values())))
            yield Score(
                f"{name} {figure['part']}".strip(),
                figure["start"],
                figure["figure"],
                tuple(figure["by_seed"]),
                tuple(figure["interval"]),
                _TASK_TYPES.get(spec.kind, "text-classification"),
                (repository, split.config or config, split.name),
            )


def _own(part: dict[str, Any] | None) -> Iterator[Score]:
    """Take the figures of own files."""
    for start, figures in (part["summary"] if part else {}).items():
        assert part is not None, "an empty part has no figures"
        runs = [run["scores"] for run in part["runs"] if run["start"] == start]
        train, test = part["files"]
        for figure in figures:
            yield Score(
                Path(train).stem,
                start,
                figure,
                tuple(scores[figure] for scores in runs),
                tuple(part["intervals"][start][figure]),
                _TASK_TYPES.get(part["kind"], "text-classification"),
                (Path(train).name, None, Path(test).name),
            )


def add_scores(export: Path, scores: Scores) -> list[Path]:
    """Write scores into the cards of an export.

    Args:
        export: Folder of `deberta export`.
        scores: Of this export.

    Returns:
        The cards.

    Raises:
        UserError: It is no export, or the scores are of other weights.
    """
    names = [n for n in ("discriminator", "generator") if (export / n / "README.md").is_file()]
    if not names:
        raise UserError(f"{export}: no export of `deberta export`, which has cards (README.md)")
    # What is fine-tuned is the discriminator, where there is one.
    encoder = export / names[0]
    if scores.models - {model_digest(encoder)}:
        raise UserError(
            f"--scores: what was scored has other weights than {encoder}; evaluate this export"
        )
    step = read_json(encoder / PRETRAINING_CONFIG)["export"]["step"]
    for report in scores.pairs:
        if report["step"] != step:
            raise UserError(
                f"--scores: minimal pairs of step {report['step']:,}, but {export} is of step "
                f"{step:,}; evaluate this export"
            )
    cards = []
    for name in names:
        path = export / name / "README.md"
        card = ModelCard.load(path)
        own = scores.scores if name == names[0] else ()
        shown = [score for score in own if score.start == "pretrained"]
        if shown:
            assert isinstance(card.data, ModelCardData), "cards of models have this"
            card.data.model_name = f"{export.resolve().name} {name}"
            card.data.eval_results = [_eval_result(score) for score in shown]
        card.text = _with_section(card.text, _section(own, scores, name))
        write_durably(path, str(card).rstrip("\n") + "\n")
        cards.append(path)
    return cards


def _eval_result(score: Score) -> EvalResult:
    """Say it as the hub does."""
    repository, config, split = score.dataset
    return EvalResult(
        task_type=score.task_type,
        dataset_type=repository,
        dataset_name=score.task,
        dataset_config=config,
        dataset_split=split,
        metric_type=_METRIC_TYPES.get(score.figure, score.figure),
        metric_name=f"{score.figure}, mean of {len(score.by_seed)} seeds",
        metric_value=round(statistics.fmean(score.by_seed), 6),
    )


def _section(own: Sequence[Score], scores: Scores, network: str) -> str:
    """Tabulate for people; nothing where there is nothing of this network."""
    lines: list[str] = []
    if own:
        lines += [
            "| task | figure | mean | sd | seeds | 95 % interval |",
            "|---|---|---|---|---|---|",
        ]
    for score in own:
        sd = f"{statistics.stdev(score.by_seed):.4f}" if len(score.by_seed) > 1 else ""
        low, high = score.interval
        lines.append(
            f"| {score.task}{_STARTS[score.start]} | {score.figure} | "
            f"{statistics.fmean(score.by_seed):.4f} | {sd} | {len(score.by_seed)} | "
            f"{low:.4f} .. {high:.4f} |"
        )
    if own:
        lines += ["", "Mean and standard deviation over seeds; the interval is of the mean, over"]
        lines += ["draws of the scored examples. Nothing was chosen on them.", "", "```"]
        lines += [*scores.commands, "```"]
    lines += _pair_lines(scores.pairs, network)
    return "\n".join(["## Evaluation", "", *lines]) if lines else ""


def _pair_lines(reports: Sequence[dict[str, Any]], network: str) -> list[str]:
    """Tabulate what the network prefers of minimal pairs."""
    lines = []
    for report in reports:
        groups = [g for g in report["groups"] if network in g["accuracy"] and g["field"] != "UID"]
        if not groups:
            continue
        name = Path(report["pairs_path"]).name
        lines += ["", f"Minimal pairs of {name}, without fine-tuning:", ""]
        lines += [
            "| pairs about | pairs | good one preferred | 95 % interval |",
            "|---|---|---|---|",
        ]
        for group in groups:
            low, high = group["interval"][network]
            lines.append(
                f"| {group['value'] or 'all'} | {group['pairs']:,} | "
                f"{group['accuracy'][network]:.4f} | {low:.4f} .. {high:.4f} |"
            )
    return lines


def _with_section(text: str, section: str) -> str:
    """Put the section in the place of an earlier one, or before the licence."""
    text = _SECTION.sub("", text)
    if not section:
        return text
    block = f"{_BEGIN}\n{section}\n{_END}\n"
    before, licence, after = text.partition("\n## Licence\n")
    if licence:
        return f"{before.rstrip()}\n\n{block}{licence}{after}"
    return f"{text.rstrip()}\n\n{block}"
