"""Looks at what is installed: Python, and every package against the ranges that are asked for.

- `look_at_packages`: Python, packages, extras.
- `Wanted`: the ranges, of pyproject.toml in a source tree, of the installed metadata elsewhere.

What the direct dependencies ask for counts, too: it says which tokenizers a transformers, and which
Triton a torch, was made for.
"""

import importlib.metadata
import platform
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from pipeline.preflight.finding import Finding

DISTRIBUTION = "deberta-pretrain"
EXTRAS = ("mpi", "kernels", "clean", "remote", "onnx")
"""Those that change what the program can do."""
_SHOWN = ("torch", "deepspeed", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class Wanted:
    """What this program asks for."""

    python: str
    """A range."""
    packages: tuple[Requirement, ...]
    extras: dict[str, tuple[Requirement, ...]]

    @classmethod
    def of_source(cls, pyproject: Path) -> "Wanted":
        """Read pyproject.toml: metadata of an editable installation may be older than the code.

        Args:
            pyproject: The file.

        Returns:
            What it asks for.
        """
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        extras = {
            name: tuple(Requirement(line) for line in lines)
            for name, lines in project.get("optional-dependencies", {}).items()
            if name in EXTRAS
        }
        packages = tuple(Requirement(line) for line in project["dependencies"])
        return cls(project.get("requires-python", ""), packages, extras)

    @classmethod
    def of_metadata(cls, distribution: str) -> "Wanted":
        """Read what pip has written when it installed us.

        Args:
            distribution: Our name.

        Returns:
            What it asks for.

        Raises:
            importlib.metadata.PackageNotFoundError: It is not installed.
        """
        python = importlib.metadata.metadata(distribution)["Requires-Python"] or ""
        extras = {name: tuple(_requirements(distribution, name)) for name in EXTRAS}
        return cls(python, tuple(_requirements(distribution)), extras)


def look_at_packages(
    node: str, pyproject: Path | None = None, distribution: str = DISTRIBUTION
) -> list[Finding]:
    """Compare what is installed with what is asked for.

    Args:
        node: This node's name.
        pyproject: Of the source tree that runs; None where there is none.
        distribution: Whose metadata counts then.

    Returns:
        Python, packages and extras; one finding for each package that is wrong.
    """
    try:
        if pyproject is not None and pyproject.is_file():
            wanted = Wanted.of_source(pyproject)
        else:
            wanted = Wanted.of_metadata(distribution)
    except importlib.metadata.PackageNotFoundError:
        cure = "pip install -c constraints.txt -e . in the folder of pyproject.toml"
        text = f"{distribution} is not installed, so that no ranges are known"
        return [Finding(node, "packages", True, text, cure)]
    wrong = list(_wrong(node, distribution, wanted.packages))
    for each in wanted.packages:
        if version := _version(each.name):
            wrong += _wrong(node, f"{each.name} {version}", list(_requirements(each.name)))
    first = {each.check: each for each in reversed(wrong)}  # what we ask for ourselves
    findings = [_python(node, wanted.python), *reversed(first.values())]
    if not wrong:
        shown = ", ".join(f"{name} {_version(name)}" for name in _SHOWN if _version(name))
        text = f"{len(wanted.packages)} in their ranges, and in each other's: {shown}"
        findings.append(Finding(node, "packages", True, text))
    return [*findings, _extras(node, wanted.extras)]


def _python(node: str, wanted: str) -> Finding:
    here = platform.python_version()
    if not SpecifierSet(wanted).contains(here, prereleases=True):
        cure = "make a virtual environment with such a Python (make venv PYTHON=...)"
        return Finding(node, "python", False, f"{here}, and {wanted} is needed", cure)
    return Finding(node, "python", True, f"{here} of {platform.python_implementation()}")


def _requirements(distribution: str, extra: str = "") -> Iterator[Requirement]:
    """What a distribution asks for on this machine; or what one of its extras adds."""
    for line in importlib.metadata.requires(distribution) or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:  # old packages have lines that pip takes no more, either
            continue
        marker = requirement.marker
        is_always = marker is None or marker.evaluate({"extra": ""})
        is_here = (
            is_always if not extra else marker is not None and marker.evaluate({"extra": extra})
        )
        if is_here and not (extra and is_always):
            yield requirement


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wrong(node: str, whose: str, wanted: Sequence[Requirement]) -> Iterator[Finding]:
    """One finding for each package that is missing or outside of its range."""
    for each in wanted:
        here = _version(each.name)
        # Builds such as 2.13.0+cpu and previews count by their number.
        if here is not None and each.specifier.contains(here, prereleases=True):
            continue
        asked = f"{each.name}{each.specifier}"
        text = f"{here or 'not installed'}, and {whose} asks for {asked}"
        # pip would replace a torch for one driver by one for another.
        note = ", with the index of your driver (pytorch.org)" if each.name == "torch" else ""
        cure = f"pip install -c constraints.txt '{asked}'{note}"
        yield Finding(node, f"package {each.name}", False, text, cure)


def _extras(node: str, extras: dict[str, tuple[Requirement, ...]]) -> Finding:
    """Say which extras are there; a package of one that is outside of its range is a warning."""
    there, absent, broken = [], [], []
    for extra, wanted in extras.items():
        # A system's MPI does without mpich's wheel, so that a part of an extra may be all of it.
        found = [each for each in wanted if _version(each.name)]
        missing = [each.name for each in wanted if each not in found]
        broken += list(_wrong(node, f"[{extra}]", found))
        if found:
            there.append(f"{extra} (without {', '.join(missing)})" if missing else extra)
        else:
            absent.append(extra)
    text = f"{', '.join(there) or 'none'} installed"
    text += f"; not {', '.join(absent)}" if absent else ""
    if broken:
        told = "; ".join(f"{each.check} {each.text}" for each in broken)
        return Finding(node, "extras", True, f"{text}; {told}", broken[0].cure)
    return Finding(node, "extras", True, text)
