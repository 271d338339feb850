"""How every benchmark here measures: interleaved rounds, ratios within a round, one JSON file.

    1. A benchmark names cases that do the same work: ours and its peers.
    2. `measure` runs every case once a round, each round from another case on, so that a
       neighbour's load falls on all of them alike. The first round warms up and is not kept.
    3. A ratio is taken within each round; its median is the result, with the lowest and the
       highest round beside it. Only ratios may be compared between machines or days.
    4. `main` writes results/NAME-DEVICE.json, from which `run.py` makes its tables.

CPU benchmarks count CPU-seconds of the process and its children, which a neighbour inflates less
than wall time; where waiting is the point (a device, a disk) the clock is the wall.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

RESULTS = Path(__file__).parent / "results"
EXIT_SKIPPED = 77
PACKAGES = (
    *("torch", "transformers", "numpy", "triton"),
    *("deepspeed", "sentencepiece", "tokenizers", "datasets"),
)


@dataclass(frozen=True)
class Case:
    """One way of doing the work; `prepare` is not timed."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    optional: bool = False
    """Left out, with a note, if it fails while warming up: compilers do not run everywhere."""


@dataclass
class Outcome:
    """What a benchmark found on one device."""

    benchmark: str
    unit: str
    """What the work is counted in, such as "tokens"."""
    work: float
    """Units that every case does in a round."""
    clock: str
    seconds: dict[str, list[float]]
    """case -> a duration a round."""
    pairs: list[tuple[str, str]]
    """(case, peer): how many times the peer's rate the case reaches."""
    shape: dict[str, Any]
    facts: dict[str, float] = field(default_factory=dict)
    """Exact counts and figures of this device alone."""
    notes: list[str] = field(default_factory=list)

    def rate(self, case: str) -> float:
        """Median units a second."""
        return self.work / statistics.median(self.seconds[case])

    def ratios(self) -> list[dict[str, Any]]:
        """Rate of a case over that of its peer, round by round."""
        rows = []
        for case, peer in self.pairs:
            if case in self.seconds and peer in self.seconds:
                pairs = zip(self.seconds[case], self.seconds[peer], strict=True)
                each = [theirs / ours for ours, theirs in pairs]
                rows.append({"case": case, "peer": peer, **spread(each)})
        return rows


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of some rounds."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def cpu_seconds() -> float:
    """CPU time of this process, all its threads, and the children that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def device_seconds() -> float:
    """Wall time at which the GPU has finished what it was given."""
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def exhaust(results: Iterable[object]) -> None:
    """Make results one after the other and let each go before the next, as training does."""
    deque(results, maxlen=0)


def turned(cases: Sequence[Case], number: int) -> Iterator[Case]:
    """The cases from another one on in every round."""
    yield from (cases[(position + number) % len(cases)] for position in range(len(cases)))


def measure(
    cases: Sequence[Case], rounds: int, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], list[str]]:
    """Time all cases in interleaved rounds.

    Args:
        cases: What to time.
        rounds: Rounds that are kept; one more warms up.
        clock: Its differences are durations, in seconds.

    Returns:
        Case name -> durations, and a note for every optional case that did not run.
    """
    running, notes = [], []
    for case in cases:
        try:
            case.prepare()
            case.run()
            running.append(case)
        except Exception as error:
            if not case.optional:
                raise
            notes.append(f"{case.name} does not run: {type(error).__name__}: {error}"[:300])
    seconds: dict[str, list[float]] = {case.name: [] for case in running}
    for number in range(rounds):
        for case in turned(running, number):
            case.prepare()
            start = clock()
            case.run()
            seconds[case.name].append(clock() - start)
    return seconds, notes


def device_name(device: str) -> str:
    """The model of the GPU or of the processor."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A device's name as part of a file name: "NVIDIA H100 80GB HBM3" -> nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    """Versions of the interpreter and of what is installed of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        if importlib.util.find_spec(name):
            found[name] = importlib.metadata.version(name)
    return found


def document(outcome: Outcome, device: str, loads: list[float], took: float) -> dict[str, Any]:
    """Everything about one outcome, JSON-ready."""
    return {
        "benchmark": outcome.benchmark,
        "device": device_name(device),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
        "load_average": {"before": loads[0], "after": loads[1]},
        "took_seconds": round(took, 1),
        "ratios": outcome.ratios(),
        "rates": {case: outcome.rate(case) for case in outcome.seconds},
        **asdict(outcome),
    }


def require(*modules: str) -> None:
    """Skip the benchmark, in words, where a package is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        skip(f"not installed: {', '.join(missing)}")


def skip(reason: str) -> NoReturn:
    """End a benchmark that cannot run here."""
    print(reason)
    sys.exit(EXIT_SKIPPED)


def main(benchmark: Callable[[str], Outcome], devices: Sequence[str] = ("cpu", "cuda")) -> None:
    """Run a benchmark as a program: `--device cpu|cuda`; prints the file that it wrote.

    Args:
        benchmark: Device -> outcome.
        devices: Where it has a meaning.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device not in devices:
        skip(f"has no {options.device} form")
    start, load_before = time.monotonic(), os.getloadavg()[0]
    outcome = benchmark(options.device)
    loads = [load_before, os.getloadavg()[0]]
    result = document(outcome, options.device, loads, time.monotonic() - start)
    path = options.results / f"{outcome.benchmark}-{slug(result['device'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)
