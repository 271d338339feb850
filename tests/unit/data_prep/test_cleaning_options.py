import json
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from data_prep import cleaning
from data_prep.cleaning import CleaningOptions, clean_document
from data_prep.cli import app
from data_prep.documents import Document
from data_prep.errors import UserError
from data_prep.language import identify_language, known_languages
from data_prep.manifest import Manifest
from data_prep.read_report import ReadReport

SENTENCES = (
    "The people of this country have built the roads that we travel to work each morning. "
    "They have done it with their own hands, and nobody should be allowed to forget that. "
    "In the years to come there will be more to build, and it will not be easy. "
    "But the work is good work, and there is enough of it for all of us. "
    "So let us begin with the bridge over the river, which has been closed since spring. "
)
GERMAN = (
    "Die Menschen in diesem Land haben die Straßen gebaut, auf denen wir zur Arbeit fahren. " * 3
)


def clean(text: str, **options) -> tuple[str | None, ReadReport]:
    report = ReadReport()
    kept = clean_document(Document(text, "file", "line 3"), CleaningOptions(**options), report)
    return (None if kept is None else kept.text), report


def test_nothing_is_done_that_was_not_asked_for():
    text = f"schÃ¶n a@b.de 8.8.8.8 {{ lorem ipsum {GERMAN}"
    assert clean(text) == (text, ReadReport())


def test_text_that_was_decoded_wrongly_is_put_right():
    text, report = clean("schÃ¶n â€œsoâ€\x9d \u201cquoted\u201d &amp; \ufb01n", fix_unicode=True)
    assert text == "schön \u201cso\u201d \u201cquoted\u201d &amp; \ufb01n"
    assert report.notes == {"decoding repaired": 1}
    assert clean("schön", fix_unicode=True) == ("schön", ReadReport())


def test_limits_are_kept_by_what_reaches_them():
    assert clean("four", max_characters=4, min_characters=4) == ("four", ReadReport())


def test_addresses_are_masked_and_counted():
    text, report = clean("a@b.de c@d.de 8.8.8.8", masks=("email", "ip"))
    assert text == "email@example.com email@example.com 192.0.2.1"
    assert report.notes == {"email address masked": 2, "ip address masked": 1}


@pytest.mark.parametrize(
    ("text", "options", "reason", "detail"),
    [
        ("four", {"max_characters": 3}, "too many characters", "4, 3 at most"),
        ("short", {"rules": ("gopher",)}, "Gopher quality rule", "1 words, 50 to 100000 are kept"),
        (
            "a line\n" * 9,
            {"rules": ("repetition",)},
            "Gopher repetition rule",
            "89% of the lines are repeated, 30% at most",
        ),
        ("A { here.", {"rules": ("c4",)}, "C4 rule", "holds a curly bracket"),
        (GERMAN, {"languages": ("en", "fr")}, "language", "de with probability "),
        (
            "this is",
            {"languages": ("en",), "min_language_probability": 0.5},
            "language",
            "en with probability 0.3",
        ),
    ],
)
def test_what_breaks_a_rule_is_dropped_and_told(text, options, reason, detail):
    kept, report = clean(text, **options)
    assert kept is None
    assert report.dropped == {reason: 1}
    [line] = report.lines()
    assert line.startswith(f"file: line 3: {reason} (")
    assert detail in line


def test_good_text_passes_all_rules():
    text = "A heading\n" + SENTENCES.strip()
    kept, report = clean(
        text, rules=("gopher", "repetition", "c4"), languages=("en",), min_characters=50
    )
    assert kept == SENTENCES.strip()
    assert report.notes == {"line without an end mark removed": 1}
    assert report.dropped == {}


def test_lengths_are_those_of_what_is_left():
    kept, report = clean("Too short.\n" * 30, rules=("c4",), min_characters=50)
    assert (kept, report.dropped) == (None, {"C4 rule": 1})


def test_languages_are_told():
    assert identify_language(GERMAN)[0] == "de"
    assert identify_language(SENTENCES)[0] == "en"
    assert identify_language(SENTENCES)[1] > 0.9
    assert {"en", "de", "zh", "ar"} <= known_languages()
    assert 0 <= identify_language("")[1] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_characters": 3, "min_characters": 5},
            "largest number of characters, 3, is below",
        ),
        (
            {"rules": ("gofer",)},
            'rule "gofer" is unknown or named twice; there are gopher, ',
        ),
        ({"masks": ("ip", "ip")}, 'mask "ip" is unknown or named twice; there are email, ip'),
        (
            {"languages": ("english",)},
            'language "english" is not known to py3langid; it knows ace ',
        ),
        ({"min_language_probability": 2}, "probability of a language is 2; it must lie between"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        CleaningOptions(**options)


@pytest.mark.parametrize(
    ("options", "package", "flag"),
    [
        ({"fix_unicode": True}, "ftfy", "--clean fix-unicode"),
        ({"languages": ("en",)}, "py3langid", "--clean language"),
    ],
)
def test_a_package_that_is_not_installed_is_named(monkeypatch, options, package, flag):
    from data_prep import language

    cleaning._fixer.cache_clear()
    language._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.langid", None)
    with pytest.raises(UserError, match=f"{flag} needs the package {package}; install it with pip"):
        CleaningOptions(**options)


def test_options_become_words_and_name_their_packages():
    options = CleaningOptions(
        min_characters=5,
        max_characters=900,
        fix_unicode=True,
        rules=("c4", "gopher"),
        masks=("email",),
        languages=("de", "en"),
    )
    words = options.words()
    assert " ".join(words) == (
        "--min-characters 5 --clean c4 --clean gopher --clean email --clean fix-unicode "
        "--clean max-characters=900 --clean language=de,en --clean min-language-probability=0.5"
    )
    assert CleaningOptions.parse(words[3::2], 5) == options
    assert options.packages() == ("ftfy", "py3langid")
    assert CleaningOptions().words() == ["--min-characters", "1"]
    assert CleaningOptions().packages() == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gofer"], "--clean gofer is unknown; there are gopher, repetition, c4, email, ip, fix"),
        (["language"], "--clean language is unknown; there are"),
        (["fix-unicode=1"], "--clean fix-unicode=1 is unknown; there are"),
        (["max-characters=many"], "--clean max-characters=many: many is not a number"),
        (["language=en", "language=de"], "--clean language is given twice; give it once"),
        (["c4", "c4"], 'rule "c4" is unknown or named twice'),
    ],
)
def test_words_that_mean_nothing_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        CleaningOptions.parse(words)


def test_a_build_cleans_and_counts(tmp_path, tokenizer_folder):
    rows = [SENTENCES, GERMAN, f"{SENTENCES} Write to a@b.de!", "A { here."]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    words = ["build", str(tmp_path / "a.jsonl"), "--tokenizer", str(tokenizer_folder), "--output"]
    words += [str(tmp_path / "out"), "--heldout-fraction", "0", "--clean", "c4", "--clean", "email"]
    result = CliRunner().invoke(app, [*words, "--clean", "language=en"])
    assert result.exit_code == 0, result.output
    manifest = Manifest.load(tmp_path / "out")[0]
    # The German text has three sentences, fewer than C4 asks for; so has the one with a brace.
    assert manifest.dropped == {"C4 rule": 2}
    assert manifest.notes == {"email address masked": 1}
    assert manifest.num_documents() == 2
    assert "--clean c4 --clean email --clean language=en" in manifest.command
    assert manifest.software["py3langid"] == version("py3langid")
