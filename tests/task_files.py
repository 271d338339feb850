"""Tiny files in the published forms of the tasks, with labels that their texts tell."""

import json
import random

from pipeline.evaluate.inference import LANGUAGES

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


def write_lines(path, objects):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in objects), encoding="utf-8")


def _boolq(i, label):
    return {"question": "is it so", "passage": text(label, i), "idx": i, "label": bool(label)}


def _premise(labels):
    def make(i, label):
        return {"premise": text(label, i), "hypothesis": "so", "label": labels[label], "idx": i}

    return make


def _copa(i, label):
    choices = {f"choice{n + 1}": text(int(n == label), i) for n in (0, 1)}
    asked = ("cause", "effect")[i % 2]
    return {"premise": "They fell.", **choices, "question": asked, "label": label, "idx": i}


def _wic(i, label):
    first, second = "the people", text(label, i)
    at = second.index("people")
    marks = {"start1": 4, "end1": 10, "start2": at, "end2": at + 6}
    texts = {"word": "people", "sentence1": first, "sentence2": second}
    return {**texts, **marks, "idx": i, "label": bool(label), "version": 1.1}


def _wsc(i, label):
    target = {"span1_text": "the people", "span1_index": 3, "span2_text": "They", "span2_index": 5}
    return {
        "text": f"{text(label, i)}. They won.",
        "target": target,
        "idx": i,
        "label": bool(label),
    }


def _multirc(i, label):
    answers = [{"text": text(y, i), "idx": 2 * i + n, "label": y} for n, y in enumerate((label, 1))]
    questions = [{"question": "who", "answers": answers, "idx": i}]
    return {"idx": i, "version": 1.1, "passage": {"text": "Some war.", "questions": questions}}


def _record(i, label):
    passage = f"{text(label, i)} and America {i}\n@highlight\nThe war"
    entities = []
    for name in ("people", "America"):
        at = passage.index(name)
        entities.append({"start": at, "end": at + len(name) - 1})
    right = ("people", "America")[label]
    answers = [{**entities[label], "text": right}]
    qas = [{"query": "The @placeholder won", "answers": answers, "idx": i}]
    return {
        "source": "CNN",
        "passage": {"text": passage, "entities": entities},
        "idx": i,
        "qas": qas,
    }


_SUPERGLUE = {
    "BoolQ": (_boolq, 2),
    "CB": (_premise(("entailment", "contradiction", "neutral")), 3),
    "COPA": (_copa, 2),
    "MultiRC": (_multirc, 2),
    "ReCoRD": (_record, 2),
    "RTE": (_premise(("entailment", "not_entailment")), 2),
    "WiC": (_wic, 2),
    "WSC": (_wsc, 2),
}


def _without_labels(value):
    """As in the published test files."""
    if isinstance(value, list):
        return [_without_labels(item) for item in value]
    if not isinstance(value, dict):
        return value
    hidden = {"label"} | ({"answers"} if "query" in value else set())
    return {key: _without_labels(item) for key, item in value.items() if key not in hidden}


def write_superglue(folder, train=6, dev=6, test=4):
    """All eight tasks and both diagnostics as the archives unpack."""
    for task, (make, num_labels) in _SUPERGLUE.items():
        for name, count in (("train", train), ("val", dev), ("test", test)):
            drawn = draw(count, num_labels, seed=count)
            objects = [make(i, label) for i, label in enumerate(drawn)]
            if name == "test":
                objects = _without_labels(objects)
            write_lines(folder / task / f"{name}.jsonl", objects)
    for task, names in (("AX-b", _PAIR[1:]), ("AX-g", ("premise", "hypothesis"))):
        objects = []
        for i, label in enumerate(draw(dev, 2, seed=dev)):
            texts = dict(zip(names, (text(label, i), "so"), strict=True))
            spelled = ("entailment", "not_entailment")[label]
            objects.append({**texts, "label": spelled, "idx": i, "pair_id": i // 2})
        write_lines(folder / task / f"{task}.jsonl", objects)
    return folder


def _article(i, label, has_no_answer):
    context = f"In {1000 + i} the war began. The people of America hoped for peace in {1900 + i}."
    answer = str((1000, 1900)[label] + i)
    asked = ("when did the war begin", "when was there hope")[label]
    answers = [{"text": answer, "answer_start": context.index(answer)}] * 2
    question = {"id": f"q{i}", "question": asked, "answers": answers}
    if has_no_answer:
        is_impossible = i % 3 == 2
        question |= {"is_impossible": is_impossible}
        if is_impossible:
            question |= {"answers": [], "plausible_answers": answers}
    return {"title": "t", "paragraphs": [{"context": context, "qas": [question]}]}


def write_reading(folder, train=6, dev=6):
    """SQuAD 1.1 and 2.0, RACE and SWAG as they are published."""
    for version in ("1.1", "2.0"):
        for name, count in (("train", train), ("dev", dev)):
            drawn = draw(count, 2, seed=count)
            articles = [_article(i, label, version == "2.0") for i, label in enumerate(drawn)]
            path = folder / f"SQuAD-{version}" / f"{name}-v{version}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"version": version, "data": articles}))
    for name, count in (("train", train), ("test", dev)):
        for i, label in enumerate(draw(count, 4, seed=count)):
            options = [text(int(n == label), i) for n in range(4)]
            article = {"article": "The war.", "questions": ["who _ ?"], "options": [options]}
            path = folder / "RACE" / name / ("high", "middle")[i % 2] / f"{i:04d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({**article, "answers": ["ABCD"[label]], "id": path.name}))
    header = ["", "video-id", "fold-ind", "startphrase", "sent1", "sent2", "gold-source"]
    header += [f"ending{n}" for n in range(4)]
    for name, count in (("train", train), ("val", dev), ("test", 3)):
        lines = [",".join(header + ["label"] * (name != "test"))]
        for i, label in enumerate(draw(count, 4, seed=count)):
            endings = [f'"{text(int(n == label), i)}, so"' for n in range(4)]
            row = [i, "v", i, "x", "They fell.", "Then", "gold", *endings]
            lines.append(",".join(map(str, row + [label] * (name != "test"))))
        path = folder / "SWAG" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    return folder


def write_inference(folder, train=6, test=6):
    """XNLI's two archives and ANLI's one."""
    spelled = ("entailment", "neutral", "contradictory")
    rows = []
    for language in LANGUAGES:
        path = folder / "XNLI" / "XNLI-MT-1.0" / "multinli" / f"multinli.train.{language}.tsv"
        drawn = draw(train, 3, seed=train)
        lines = [(f"{language} {text(y, i)}", "so", spelled[y]) for i, y in enumerate(drawn)]
        write_table(path, ("premise", "hypo", "label"), lines)
        for i, label in enumerate(draw(test, 3, seed=test)):
            rows.append((language, NLI[label], f"{language} {text(label, i)}", "so", i))
    header = ("language", "gold_label", "sentence1", "sentence2", "pairID")
    write_table(folder / "XNLI" / "XNLI-1.0" / "xnli.test.tsv", header, rows)
    for number in (1, 2, 3):
        for name, count in (("train", train), ("dev", test), ("test", test + number)):
            rows = [
                {"uid": f"u{i}", "context": text(y, i), "hypothesis": "so", "label": "enc"[y]}
                for i, y in enumerate(draw(count, 3, seed=count))
            ]
            write_lines(folder / "anli_v1.0" / f"R{number}" / f"{name}.jsonl", rows)
    return folder


def write_ner(folder, train=6, test=8):
    """CoNLL-2003 with the tags of its first edition, IOB1."""
    path = folder / "CoNLL-2003"
    path.mkdir(parents=True)
    for name, count in (("eng.train", train), ("eng.testa", test), ("eng.testb", test)):
        lines = ["-DOCSTART- -X- O O", ""]
        for i, label in enumerate(draw(count, 2, seed=count)):
            tag = ("I-PER", "I-LOC")[label]
            lines += [f"{w} NN I-NP O" for w in text(label, i).split()[:2]]
            lines += [f"America NN I-NP {tag}", f"{i} NN I-NP {tag}", "won VB I-VP O", ""]
        (path / name).write_text("\n".join(lines) + "\n")
    return folder
