"""Looks at what DeepSpeed compiles when training starts: the optimizer that computes on the host.

Only `offload_optimizer` needs it (ds_configs/zero2_bf16_offload.json); all else of the shipped
files runs on torch's own operators. It is compiled at the first start, by ninja and the compiler
that `CXX` names, into a folder that all processes of this user share; a process that was killed
while it compiled leaves a lock there for which every later one waits for ever.

As a program (`python -m pipeline.preflight.deepspeed_ops`) it asks DeepSpeed, which takes seconds
and may fail in ways of its own, and prints one JSON object.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.preflight.children import Answer, ask, child_environment
from pipeline.preflight.finding import Finding

OFFLOAD = "offload_optimizer alone (ds_configs/zero2_bf16_offload.json)"
_ASK_SECONDS, _TRY_SECONDS, _BUILD_SECONDS = 90.0, 30.0, 400.0
_STALE_SECONDS = 600.0
"""A build takes one or two minutes."""
_PROGRAM = """\
#include <omp.h>
#include <vector>
int main() { std::vector<int> one(1, omp_get_max_threads()); return one[0] > 0 ? 0 : 1; }
"""


def look_at_deepspeed(node: str, variables: Mapping[str, str], builds: bool) -> Iterator[Finding]:
    """See whether DeepSpeed can be imported and could compile what the shipped JSONs ask for.

    Args:
        node: This node's name.
        variables: Of the process.
        builds: Whether to compile it, which takes a minute or two.

    Yields:
        DeepSpeed itself; the compiler; a build that was left half done; the build.
    """
    environment = child_environment(variables)
    words = [sys.executable, "-m", "pipeline.preflight.deepspeed_ops"]
    answer = ask(words, environment, _ASK_SECONDS)
    facts = _facts(answer)
    if facts is None:
        cure = "python -c 'import deepspeed' shows all of it; see the lines of packages"
        yield Finding(node, "deepspeed", False, f"cannot be imported: {answer.reason}", cure)
        return
    can = ", ".join(facts["compatible"]) or "none"
    yield Finding(node, "deepspeed", True, f"{facts['version']}, ops that could be built: {can}")
    yield _compiler(node, facts, environment)
    if problem := facts.get("folder_problem"):
        cure = f"set TORCH_EXTENSIONS_DIR to a folder that can be written; needed for {OFFLOAD}"
        yield Finding(node, "offload build", True, problem, cure)
        return
    folder = Path(facts["folder"])
    if stale := stale_lock(folder):
        cure = f"end whoever still compiles, then: rm {stale}"
        text = f"{stale} was left by a build that was killed; offloading would wait for it for ever"
        yield Finding(node, "offload build", True, text, cure)
    elif builds:
        yield _build(node, environment)
    elif any(folder.glob("*.so")):
        yield Finding(node, "offload build", True, f"done before, in {folder}")
    else:
        text = "not tried: it takes a minute or two at the first start (--build tries it now)"
        yield Finding(node, "offload build", True, text)


def _facts(answer: Answer) -> dict[str, Any] | None:
    """What the child has found; it may have printed other lines before."""
    for line in reversed(answer.output.splitlines()):
        if line.startswith('{"deepspeed_ops":'):
            return json.loads(line)["deepspeed_ops"]
    return None


def _compiler(node: str, facts: Mapping[str, Any], environment: Mapping[str, str]) -> Finding:
    """Compile a few lines with the flags that DeepSpeed would use."""
    check = "compiler"
    if not facts["has_ninja"]:
        cure = f"pip install ninja, and have its folder in PATH; needed for {OFFLOAD}"
        return Finding(node, check, True, "ninja is not found", cure)
    if "cpu_adam" not in facts["compatible"]:
        text = "DeepSpeed says that its cpu_adam cannot be built here"
        return Finding(node, check, True, text, f"see `ds_report`; needed for {OFFLOAD}")
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "try.cpp"), Path(folder, "try")
        source.write_text(_PROGRAM, encoding="utf-8")
        words = [facts["compiler"], *facts["flags"], str(source), "-o", str(program)]
        answer = ask(words, environment, _TRY_SECONDS)
        if answer.code == 0:
            answer = ask([str(program)], environment, _TRY_SECONDS)
    if answer.code == 0:
        return Finding(
            node, check, True, f"{facts['compiler']} compiles with OpenMP; ninja is there"
        )
    cure = f"install g++ 9 or newer with OpenMP, or set CXX; needed for {OFFLOAD}"
    return Finding(node, check, True, f"{facts['compiler']}: {answer.reason}", cure)


def stale_lock(folder: Path, stale_seconds: float = _STALE_SECONDS) -> Path | None:
    """Find the lock of a build that will not end.

    Args:
        folder: Where torch compiles an extension.
        stale_seconds: Age from which nobody can be at work any more.

    Returns:
        Its lock; None where there is none, or somebody compiles.
    """
    lock = folder / "lock"  # torch.utils.file_baton
    try:
        age_seconds = time.time() - lock.stat().st_mtime
    except OSError:
        return None
    return lock if age_seconds > stale_seconds else None


def _build(node: str, environment: Mapping[str, str]) -> Finding:
    began = time.monotonic()
    code = "from deepspeed.ops.op_builder import CPUAdamBuilder as B; B().load(verbose=False)"
    answer = ask([sys.executable, "-c", code], environment, _BUILD_SECONDS)
    seconds = time.monotonic() - began
    if answer.code == 0:
        return Finding(node, "offload build", True, f"cpu_adam built and loaded in {seconds:.0f} s")
    return Finding(
        *(node, "offload build", False, f"cpu_adam: {answer.reason}"),
        "see the compiler's line; TORCH_EXTENSIONS_DIR must be a folder that can be written and "
        "whose files may be executed",
    )


def main() -> None:
    """Ask DeepSpeed, and print what it says as the last line."""
    import deepspeed
    from deepspeed.ops.op_builder import (
        CPUAdamBuilder,  # pyright: ignore[reportAttributeAccessIssue]
    )
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from deepspeed.ops.op_builder.builder import probe_is_compatible
    from torch.utils import cpp_extension

    builder: Any = CPUAdamBuilder()
    is_compatible = {name: probe_is_compatible(op) for name, op in ALL_OPS.items()}
    is_compatible["cpu_adam"] = probe_is_compatible(builder)  # no op of a GPU, yet built beside one
    facts = {
        "version": deepspeed.__version__,
        "compatible": sorted(
            name for name, can in is_compatible.items() if can and "not_implemented" not in name
        ),
        "has_ninja": cpp_extension.is_ninja_available(),
        "compiler": cpp_extension.get_cxx_compiler(),
        "flags": [flag for flag in builder.cxx_args() if flag],
    }
    try:
        facts["folder"] = cpp_extension._get_build_directory("cpu_adam", verbose=False)
    except OSError as error:
        facts["folder_problem"] = str(error)
    print(json.dumps({"deepspeed_ops": facts}), flush=True)


if __name__ == "__main__":
    main()
    # DeepSpeed's threads, if any, are of no use any more.
    sys.stdout.flush()
    os._exit(0)
