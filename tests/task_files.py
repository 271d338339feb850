"""Tiny files in the published forms of the tasks, with labels that their texts tell."""

import random

NLI = ("entailment", "neutral", "contradiction")
_WORDS = ("war", "peace", "hope")


def text(label, number):
    """A sentence whose first word tells the label."""
    return f"{_WORDS[label]} {number} of the people"


def draw(count, num_labels, seed):
    """Labels in no order, each about as often."""
    labels = [i % num_labels for i in range(count)]
    random.Random(seed).shuffle(labels)
    return labels


def write_table(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in ([header] if header else []) + rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rows(count, labels, make, seed):
    """A row for each drawn label."""
    drawn = draw(count, len(labels), seed)
    return [make(i, text(label, i), labels[label]) for i, label in enumerate(drawn)]


# folder: classes, training files, header and row with a label, test files, header and row without
_GLUE = {
    "CoLA": ("0", "1"),
    "SST-2": ("0", "1"),
    "MRPC": ("0", "1"),
    "QQP": ("0", "1"),
    "MNLI": NLI,
    "QNLI": ("entailment", "not_entailment"),
    "RTE": ("entailment", "not_entailment"),
    "WNLI": ("0", "1"),
}
_MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse"
_MNLI = (*_MNLI.split(), "sentence2_parse", "sentence1", "sentence2")
_IDS = ("#1 ID", "#2 ID", "#1 String", "#2 String")
_PAIR = ("index", "sentence1", "sentence2")
_LABELLED = {
    "CoLA": (None, lambda i, t, y: ("gj04", y, "" if y == "1" else "*", t)),
    "SST-2": (("sentence", "label"), lambda i, t, y: (t, y)),
    "MRPC": (("Quality", *_IDS), lambda i, t, y: (y, i, i + 1, t, 'so "they')),
    "QQP": (
        ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
        lambda i, t, y: (i, i, i, t, "why", y),
    ),
    "MNLI": ((*_MNLI, "label1", "gold_label"), lambda i, t, y: (i, *"pigabcd", t, "then", y, y)),
    "QNLI": (("index", "question", "sentence", "label"), lambda i, t, y: (i, "who", t, y)),
    "RTE": ((*_PAIR, "label"), lambda i, t, y: (i, t, "then", y)),
    "WNLI": ((*_PAIR, "label"), lambda i, t, y: (i, t, "then", y)),
}
_UNLABELLED = {
    "CoLA": (("index", "sentence"), lambda i, t, y: (i, t)),
    "SST-2": (("index", "sentence"), lambda i, t, y: (i, t)),
    "MRPC": (("index", *_IDS), lambda i, t, y: (i, i, i + 1, t, "so")),
    "QQP": (("id", "question1", "question2"), lambda i, t, y: (i, t, "why")),
    "MNLI": (_MNLI, lambda i, t, y: (i, *"pigabcd", t, "then")),
    "QNLI": (("index", "question", "sentence"), lambda i, t, y: (i, "who", t)),
    "RTE": (_PAIR, lambda i, t, y: (i, t, "then")),
    "WNLI": (_PAIR, lambda i, t, y: (i, t, "then")),
}
_STSB = ("index", "genre", "filename", "year", "old_index", "source1", "source2", *_PAIR[1:])


def write_glue(folder, train=12, dev=12, test=5):
    """All nine tasks as the archive unpacks."""
    for task, labels in _GLUE.items():
        parts = ("_matched", "_mismatched") if task == "MNLI" else ("",)
        header, make = _LABELLED[task]
        write_table(folder / task / "train.tsv", header, _rows(train, labels, make, 1))
        for part in parts:
            rows = _rows(dev, labels, make, 2 + len(part))
            write_table(folder / task / f"dev{part}.tsv", header, rows)
            plain, make_plain = _UNLABELLED[task]
            rows = _rows(test, labels, make_plain, 3)
            write_table(folder / task / f"test{part}.tsv", plain, rows)
    for name, count in (("train", train), ("dev", dev), ("test", test)):
        scores = [random.Random(count + i).uniform(0, 5) for i in range(count)]
        rows = [(i, *"gfyosS", f"war {s:.2f}", "hope", f"{s:.3f}") for i, s in enumerate(scores)]
        is_test = name == "test"
        header = _STSB if is_test else [*_STSB, "score"]
        rows = [row[: len(header)] for row in rows]
        write_table(folder / "STS-B" / f"{name}.tsv", header, rows)
    rows = [(i, text(0, i), "then") for i in range(test)]
    write_table(folder / "diagnostic" / "diagnostic.tsv", _PAIR, rows)
    return folder
