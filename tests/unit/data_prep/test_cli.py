import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import pytest

from data_prep import console
from data_prep.build import BuildReport
from data_prep.manifest import Manifest
from data_prep.read_report import ReadReport
from data_prep.tokenizer import Tokenizer

COMMANDS = ["train-tokenizer", "build", "dedup", "verify", "show", "stats"]


def test_help_lists_the_commands(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Example: deberta-prep {command} " in " ".join(out.split())
    assert "--json" in out


def test_importing_the_command_line_is_light():
    heavy = ["torch", "transformers", "datasets", "pyarrow", "rich.table", "tokenizers", "pandas"]
    script = "import sys, data_prep.cli; print([m for m in sys.argv[1:] if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", script, *heavy], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_python_dash_m_is_the_same_command():
    found = subprocess.run(
        [sys.executable, "-m", "data_prep", "--help"], capture_output=True, text=True, check=True
    )
    assert "train-tokenizer" in found.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "x", "--output", "d"], "Missing option '--tokenizer'"),
        (["buidl"], "No such command 'buidl'"),
        (["build", "x", "--tokenizer", "t", "--output", "d", "--worker", "3"], "--workers"),
        (["build", "x", "--tokenizer", "t", "--output", "d", "--workers", "two"], "'--workers'"),
        (["build", "x", "--tokenizer", "t", "--output", "d", "--workers", "0"], "--workers 0"),
        (["build", "nowhere", "--tokenizer", "t", "--output", "d"], "nowhere"),
        (["verify", "nowhere"], "error: nowhere: no such dataset folder"),
        (["stats", "nowhere"], "error: nowhere: no such dataset folder"),
        (["show", "nowhere", "--document", "1"], "error: nowhere: no such dataset folder"),
        (["verify", "x", "--sample", "0"], "--sample"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(run, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err + out
    assert not list(tmp_path.iterdir())


def test_a_missing_tokenizer_is_told_before_anything_is_made(run, tiny_corpus, tmp_path):
    output = tmp_path / "d"
    code, _, err = run("build", tiny_corpus, "--tokenizer", tmp_path / "t", "--output", output)
    assert code == 2
    assert "train-tokenizer" in err
    assert not output.exists()


def test_build_prints_a_report_and_json(run, tiny_corpus, tiny_tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "kato"}\nnonsense\n')
    words = ["build", tiny_corpus / "a.jsonl", tmp_path / "bad.jsonl", "--output", tmp_path / "d"]
    code, out, err = run(*words, "--tokenizer", tiny_tokenizer)
    assert code == 0, err
    assert "bytes a token" in out
    assert "bad.jsonl: line 2: invalid JSON" in out
    assert "build: 2 of 2 units" in err
    code, out, _ = run(*words, "--tokenizer", tiny_tokenizer, "--json")
    values = json.loads(out)
    manifest, fingerprint = Manifest.load(tmp_path / "d")
    assert values["already_complete"] is True
    assert values["fingerprint"] == fingerprint
    assert values["documents"] == 151
    assert values["dropped"] == {"invalid JSON": 1}
    assert values["splits"]["train"]["tokens"] == manifest.num_tokens("train")
    code, out, _ = run(*words, "--tokenizer", tiny_tokenizer)
    assert "is complete already; nothing is left to do" in out


def test_verify_prints_rates_and_json(run, tiny_dataset):
    code, out, _ = run("verify", tiny_dataset)
    assert code == 0
    assert "are what was written" in out
    assert "decoded and encoded again: 0 of 220 documents" in out
    code, out, _ = run("verify", tiny_dataset, "--full", "--json", "--workers", "2")
    assert json.loads(out)["roundtrip"]["document_rate"] == 0


def test_verify_of_damage_exits_with_88_and_names_the_file(run, tiny_dataset, tmp_path):
    damaged = shutil.copytree(tiny_dataset, tmp_path / "d")
    path = damaged / "shard-00002.tokens.npy"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    code, _, err = run("verify", damaged)
    assert code == 88
    assert "shard-00002.tokens.npy: its sha256 is not the manifest's" in err


def test_show_prints_text_and_pieces(run, tiny_dataset, tiny_corpus, tiny_tokenizer):
    code, out, _ = run("show", tiny_dataset, "--document", 3, "--split", "heldout", "--json")
    assert code == 0
    values = json.loads(out)
    lines = (tiny_corpus / "a.jsonl").read_text().splitlines()
    assert values["text"] in [json.loads(line)["text"] for line in lines]
    assert values["ids"] == Tokenizer.load(tiny_tokenizer).encode(values["text"])
    code, out, _ = run("show", tiny_dataset, "--document", 3, "--split", "heldout")
    assert f"\n{values['text']}\n" in out
    assert " ".join(values["pieces"]) in out


def test_show_of_no_document_says_how_many_there_are(run, tiny_dataset):
    code, _, err = run("show", tiny_dataset, "--document", 9999)
    assert code == 2
    assert "no document 9999 in split train, which has" in err


def test_stats_prints_a_table_and_json(run, tiny_dataset):
    code, out, _ = run("stats", tiny_dataset)
    assert code == 0
    assert "heldout" in out
    assert "p90" in out
    code, out, _ = run("stats", tiny_dataset, "--json")
    groups = json.loads(out)
    totals = [group["documents"] for group in groups if group["source"] == "all"]
    assert sum(totals) == 220


def test_train_tokenizer_prints_its_fit(run, tiny_corpus, tmp_path):
    words = ["train-tokenizer", tiny_corpus, "--vocab-size", "350"]
    code, out, _ = run(*words, "--output", tmp_path / "t", "--json")
    assert code == 0
    values = json.loads(out)
    assert (values["num_pieces"], values["vocab_size"]) == (350, 400)
    assert values["reading"]["documents"] == 220
    assert Tokenizer.load(tmp_path / "t").fingerprint == values["fingerprint"]
    code, out, _ = run(*words, "--output", tmp_path / "u")
    assert code == 0
    assert "tokens_per_word" in out


def test_control_c_stops_at_once_and_says_how_to_go_on(texts, jsonl, tiny_tokenizer, tmp_path):
    factor = 1
    while True:
        folder = tmp_path / f"x{factor}"
        folder.mkdir()
        jsonl(folder / "a.jsonl", texts(30_000 * factor, seed=1))
        code, output = interrupted_build(folder, tiny_tokenizer)
        if code != 0 or factor > 16:
            break
        factor *= 4  # a busy machine looked when all was done
    assert code == 130, output
    assert "interrupted; run the same command to go on with d" in output
    assert "Traceback" not in output


def interrupted_build(folder, tokenizer):
    """Build from a.jsonl, interrupted after its first unit; (exit code, what it printed)."""
    words = ["build", "a.jsonl", "--tokenizer", str(tokenizer), "--output", "d"]
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep", *words, "--workers", "2", "--unit-bytes", "10000"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 100
    while not list(folder.glob("d/.work/unit-*/done.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # As a terminal does: the whole group gets the signal.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_a_terminal_gets_a_bar(tiny_corpus, tiny_tokenizer, tmp_path):
    terminal, ours = pty.openpty()
    words = ["build", tiny_corpus, "--tokenizer", tiny_tokenizer, "--output", tmp_path / "d"]
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=ours,
    )
    os.close(ours)
    shown = b""
    # Reading a terminal that everybody has left is an error, not an end.
    with suppress(OSError), os.fdopen(terminal, "rb", buffering=0) as file:
        while piece := file.read(4096):
            shown += piece
    assert process.wait() == 0
    assert "\u2501".encode() in shown
    assert b" tokens" in shown
    assert b"build: " not in shown


def test_odd_datasets_are_warned_about(tiny_dataset, tmp_path):
    manifest, _ = Manifest.load(tiny_dataset)
    train = [shard for shard in manifest.shards if shard.split == "train"]
    many = tuple(replace(train[0], name=f"shard-{n:05d}") for n in range(150))
    odd = replace(manifest, shards=many)
    first, second = console.build_warnings(BuildReport(tmp_path, "", odd, ReadReport(), 0, 1.0))
    assert first.startswith("no document went to the split heldout")
    assert second.startswith("150 shards are smaller than 1 MiB")
    sound = BuildReport(tmp_path, "", manifest, ReadReport(), 0, 1.0)
    assert console.build_warnings(sound) == []
