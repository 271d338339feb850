"""What no line of ours may say: loaders that execute, shells, listening to everybody."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "data_prep")
FOLDERS = (*PACKAGES, "slurm", "ds_configs")
BUILTINS = {"eval", "exec", "compile", "__import__"}
LOADERS = {  # function -> keyword without which, or with another value than which, it is refused
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
}
NEVER = re.compile(
    r"(pickle|cPickle|dill|cloudpickle|marshal|shelve|joblib)\.(load|loads|Unpickler|open)"
    r"|yaml\.(load|full_load|unsafe_load|load_all)"
    r"|os\.(system|popen)|subprocess\.(getoutput|getstatusoutput)"
    r"|numpy\.fromregex|torch\.jit\.load|torch\.package\..*|runpy\..*"
)
TRUST = re.compile(r"trust_remote_code\s*=\s*True")
TEXT = re.compile(r"--bind_all|0\.0\.0\.0|INADDR_ANY|" + TRUST.pattern)
# The class of the discriminator's head, which an export has just written there itself.
OWN_CLASS = {
    "pipeline/export_reload.py": "rtd_class.from_pretrained(folder",
    "pipeline/model_card.py": 'AutoModelForPreTraining.from_pretrained("PATH/discriminator"',
    "pipeline/modeling_rtd.py": 'AutoModelForPreTraining.from_pretrained("PATH/discriminator"',
    "README.md": 'AutoModelForPreTraining.from_pretrained("mine/discriminator"',
}


def sources():
    return sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))


def texts():
    """Everything that people run or copy from."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    named = [ROOT / name for name in ("README.md", "Makefile", "pyproject.toml")]
    return [p for p in [*found, *named] if p.suffix in (".py", ".md", ".sh", ".toml", ".json", "")]


def full_names(tree):
    """Local name -> the module or function that it stands for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                (a.asname or a.name.split(".")[0]): (a.asname and a.name) or a.name.split(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {(a.asname or a.name): f"{node.module}.{a.name}" for a in node.names}
    return names


def called(node, names):
    """The dotted name of what a call calls, its import resolved: np.load -> numpy.load."""
    try:
        first, _, rest = ast.unparse(node.func).partition(".")
    except ValueError:
        return ""
    return ".".join(filter(None, (names.get(first, first), rest)))


def offences(code):
    """What a file says that no file may: (line, call)."""
    tree = ast.parse(code)
    names = full_names(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = called(node, names)
        keywords = {k.arg: getattr(k.value, "value", k.value) for k in node.keywords}
        if (isinstance(node.func, ast.Name) and name in BUILTINS) or NEVER.fullmatch(name):
            yield node.lineno, name
        if keywords.get("shell") not in (None, False) or keywords.get("trust_remote_code") is True:
            yield node.lineno, name
        if name in LOADERS:
            keyword, value = LOADERS[name]
            # numpy's default is safe; torch's was not, and depends on the environment.
            if keywords.get(keyword, None if name == "torch.load" else value) is not value:
                yield node.lineno, name


def without_own_class(path):
    """A file's text, but for the one line of it that may trust a repository's code."""
    lines = path.read_text(encoding="utf-8").split("\n")
    trusted = OWN_CLASS.get(str(path.relative_to(ROOT)))
    own = [n for n, line in enumerate(lines) if trusted and trusted in line and TRUST.search(line)]
    assert len(own) == (trusted is not None), f"{path}: {own}"
    for n in own:
        lines[n] = TRUST.sub("", lines[n])
    return "\n".join(lines)


@pytest.mark.row(30)
def test_no_code_of_ours_executes_what_it_reads(note):
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sources()
        if (lines := list(offences(without_own_class(path))))
    }
    assert not found
    note(f"the source of {len(sources())} modules", "no unpickling, no eval, no shell")


@pytest.mark.row(31)
def test_nothing_of_ours_listens_to_everybody(note):
    found = {
        str(path.relative_to(ROOT)): match[0]
        for path in texts()
        if (match := TEXT.search(without_own_class(path)))
    }
    assert not found
    note(f"{len(texts())} files of code, scripts and pages", "no --bind_all, no 0.0.0.0")


BAD = [
    "import pickle\npickle.load(f)",
    "from pickle import loads\nloads(b)",
    "import pickle as p\np.Unpickler(f).load()",
    "import torch\ntorch.load(f)",
    "import torch\ntorch.load(f, weights_only=False)",
    "import torch\ntorch.load(f, weights_only=flag)",
    "from torch import load\nload(f)",
    "import numpy as np\nnp.load(f, allow_pickle=True)",
    "import yaml\nyaml.load(f)",
    "eval(text)",
    "exec(text)",
    "import subprocess\nsubprocess.run(line, shell=True)",
    "import os\nos.system(line)",
    "from transformers import AutoModel\nAutoModel.from_pretrained(p, trust_remote_code=True)",
]
GOOD = [
    "import torch\ntorch.load(f, map_location='cpu', weights_only=True)",
    "import numpy as np\nnp.load(f, mmap_mode='r')",
    "import yaml\nyaml.safe_load(f)",
    "model.eval()",
    "import subprocess\nsubprocess.run(words)",
    "import pickle\ntry:\n    pass\nexcept pickle.UnpicklingError:\n    pass",
]


def test_the_search_finds_what_it_should():
    assert [code for code in BAD if not list(offences(code))] == []
    assert [code for code in GOOD if list(offences(code))] == []
