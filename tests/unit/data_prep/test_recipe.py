import json

import pytest
from typer.testing import CliRunner

from data_prep.build_plan import BuildOptions
from data_prep.cleaning import CleaningOptions
from data_prep.cli import app
from data_prep.documents import ReadOptions
from data_prep.errors import UserError
from data_prep.handling import SourceHandling
from data_prep.manifest import Manifest
from data_prep.recipe import load_recipe
from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer

TOML = """
heldout_fraction = 0.25
clean = ["email"]
text_field = "body"

[[sources]]
path = "a.jsonl"
weight = 3.0

[[sources]]
path = "b.csv"
text_field = "text"
clean = ["ip", "max-characters=50"]
min_characters = 3
"""
YAML = """
heldout_fraction: 0.25
clean: [email]
text_field: body
sources:
  - {path: a.jsonl, weight: 3.0}
  - path: b.csv
    text_field: text
    clean: [ip, max-characters=50]
    min_characters: 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"body": "write to a@b.de"}, {"body": "from 8.8.8.8"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.csv").write_text("text\nc@d.de at 8.8.8.8\nx\n" + "long " * 20 + "\n")
    (tmp_path / "corpus.toml").write_text(TOML)
    return tmp_path


def written(folder, name, content):
    (folder / name).write_text(content)
    return folder / name


def test_a_source_takes_from_the_recipe_what_it_does_not_say(folder):
    content = """
clean = ["email"]
min_characters = 4
txt_document = "line"
unit_bytes = 5000
shard_tokens = 7000
sources = [{path = "a.jsonl", text_field = "body"}, {path = "b.csv", clean = []}]
"""
    _, options = load_recipe(written(folder, "r.toml", content))
    a, b = options.handling.of("a.jsonl"), options.handling.of("b.csv")
    assert a.read == ReadOptions(text_field="body", txt_document="line")
    assert a.cleaning == CleaningOptions(min_characters=4, masks=("email",))
    assert b.cleaning == CleaningOptions(min_characters=4)
    assert (options.unit_bytes, options.shard_tokens) == (5000, 7000)


@pytest.mark.parametrize(("name", "content"), [("r.toml", TOML), ("r.yaml", YAML), ("r.yml", YAML)])
def test_a_recipe_is_sources_and_options(folder, name, content):
    sources, options = load_recipe(written(folder, name, content))
    assert sources == ["a.jsonl", "b.csv"]
    own = SourceHandling(
        ReadOptions(text_field="text"),
        CleaningOptions(min_characters=3, max_characters=50, masks=("ip",)),
    )
    assert options == BuildOptions(
        read=ReadOptions(text_field="body"),
        cleaning=CleaningOptions(masks=("email",)),
        heldout_fraction=0.25,
        others=(("b.csv", own),),
        weights=(("a.jsonl", 3.0), ("b.csv", 1.0)),
        recipe=str(folder / name),
    )


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def texts(dataset) -> list[str]:
    opened = Dataset.open(dataset)
    tokenizer = Tokenizer.load(opened.tokenizer_folder)
    counts = {split: opened.manifest.num_documents(split) for split in ("train", "heldout")}
    return sorted(
        tokenizer.decode(opened.document(split, n)[0])
        for split in counts
        for n in range(counts[split])
    )


def test_each_source_is_built_in_its_own_way(folder, tokenizer_folder):
    done = run(
        "build", "--recipe", "corpus.toml", "--tokenizer", tokenizer_folder, "--output", "out"
    )
    assert done.exit_code == 0, done.output
    assert texts("out") == [
        "c@d.de at 192.0.2.1",
        "from 8.8.8.8",
        "write to email@example.com",
    ]
    manifest = Manifest.load(folder / "out")[0]
    assert [(s.name, s.weight) for s in manifest.sources] == [("a.jsonl", 3.0), ("b.csv", 1.0)]
    assert manifest.sources[0].options == ""
    assert manifest.sources[1].options == (
        "--text-field text --txt-document file --max-document-bytes 16777216 --min-characters 3 "
        "--clean ip --clean max-characters=50"
    )
    assert manifest.command.startswith("deberta-prep build --recipe corpus.toml --tokenizer ")
    assert manifest.dropped == {"too many characters": 1, "too short": 1}


def test_a_changed_recipe_is_another_dataset(folder, tokenizer_folder):
    words = ("build", "--recipe", "corpus.toml", "--tokenizer", tokenizer_folder, "--output", "out")
    assert run(*words).exit_code == 0
    written(folder, "corpus.toml", TOML.replace('"ip", ', ""))
    done = run(*words)
    assert isinstance(done.exception, UserError)
    assert "was built from something else" in str(done.exception)
    written(folder, "corpus.toml", TOML)
    assert run(*words).exit_code == 0


def test_deduplication_reads_the_same_recipe(folder, tokenizer_folder):
    assert run("dedup", "--recipe", "corpus.toml", "--output", "decisions").exit_code == 0
    words = ("build", "--recipe", "corpus.toml", "--tokenizer", tokenizer_folder, "--output", "out")
    assert run(*words, "--dedup", "decisions").exit_code == 0
    written(folder, "corpus.toml", TOML.replace("min_characters = 3", "min_characters = 4"))
    done = run(*words[:-1], "other", "--dedup", "decisions")
    assert isinstance(done.exception, UserError)


def test_words_beside_a_recipe_are_refused(folder, tokenizer_folder):
    words = ["--recipe", "corpus.toml", "--tokenizer", tokenizer_folder, "--output", "out"]
    done = run("build", "a.jsonl", *words, "--text-field", "x", "--clean", "ip")
    assert str(done.exception) == (
        "--recipe corpus.toml says this already: sources, --text-field, --clean; write them into "
        "the file"
    )
    done = run("build", "--tokenizer", tokenizer_folder, "--output", "out")
    assert "no source was named" in str(done.exception)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.toml", "sources = 3", "r.toml: sources: Input should be a valid list"),
        ("r.toml", "", "r.toml: sources: Field required"),
        ("r.toml", "sources = []", "r.toml: sources: List should have at least 1 item"),
        (
            "r.toml",
            '[[sources]]\npath = ""',
            "sources.0.path: String should have at",
        ),
        (
            "r.toml",
            '[[sources]]\npaths = "a"',
            "sources.0.paths is unknown; there are path",
        ),
        (
            "r.toml",
            'fields = 1\n[[sources]]\npath = "a"',
            "fields is unknown; there are sources",
        ),
        (
            "r.toml",
            '[[sources]]\npath = "a"\nweight = -1.0',
            "sources.0.weight: Input should",
        ),
        (
            "r.toml",
            '[[sources]]\npath = "a"\nclean = ["x"]',
            "r.toml: --clean x is unknown; ",
        ),
        ("r.toml", '[[sources]]\npath = "a"\n[[sources]]\npath = "a"', "sources name a twice"),
        ("r.toml", "[[sources", "r.toml is not TOML: "),
        ("r.yaml", "a: [b", "r.yaml is not YAML: while parsing"),
        ("r.yaml", "- a", "r.yaml: the file: Input should be a valid dictionary"),
        ("r.json", "{}", "r.json: its name must end in .toml, .yaml or .yml"),
    ],
)
def test_an_impossible_recipe_is_refused(folder, name, content, message):
    with pytest.raises(UserError, match=message):
        load_recipe(written(folder, name, content))


def test_a_recipe_that_is_not_there_is_named(folder):
    with pytest.raises(UserError, match=r"recipe none.toml cannot be read: .* name a .toml"):
        load_recipe(type(folder)("none.toml"))
