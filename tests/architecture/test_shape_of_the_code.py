"""The architecture, held by the code itself: layers, sizes, names, and what imports cost."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("data_prep", "pipeline")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80

# Layer of every module of `pipeline`; imports go down or stay. A new module must be put here.
LAYERS = {
    1: "config config_schedule rate_table config_networks config_files config_keys "
    "config_loading ds_checks ds_config ds_schema findings flops phases resume_rules schedule "
    "terminal plan",
    2: "modeling counter_rng masking masking_words rtd data sample_order sequences masking_host "
    "mixture mixture_sources",
    3: "optimizer metrics metrics_writer runtime run_folder throughput prefetch progress faults "
    "watchdog hang_report rendezvous run_lock stragglers stop_signal skip_list spikes profiling "
    "memory_snapshot compilation slurm_ranks refusals flight_record host_memory resources "
    "reference_curves energy",
    4: "engine rank_files engine_state engine_reads engine_reload engine_stepping replicas",
    5: "trainer checkpoint commit step objective_keys assemble banner export export_reload "
    "export_verify hf_layout model_card evaluate compare run_data weights guard initialize "
    "session run_services training_step train_state recovery commit_writer commit_upkeep "
    "commit_conversion resume divergence extend preflight launch submit report "
    "export_facts export_repositories export_weights modeling_rtd card_scores "
    "export_onnx onnx_text export_commits hub_push",
    6: "cli commands_plan commands_extend commands_checkpoint commands_export commands_evaluate "
    "commands_compare commands_doctor commands_launch commands_submit commands_report "
    "commands_evaluate_options commands_card train dry_run demo",
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names.split()}
CONTRACT = {"data_prep.errors", "data_prep.manifest", "data_prep.shards", "data_prep.tokenizer"}
MAY_NAME_DEEPSPEED = {"engine", "engine_reads", "checkpoint", "export", "preflight"}
FORBIDDEN_BELOW_SERVICES = {"deepspeed", "torch.distributed", "time"}


def modules():
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_name(module):
    """`pipeline.modeling.heads` -> `modeling`; the package itself has no layer."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imports(path):
    """All imported modules of a file, those under TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_go_down(path):
    module = dotted(path)
    if module.startswith("data_prep"):
        foreign = [name for name in imports(path) if name.split(".")[0] in ("pipeline", "torch")]
        assert not foreign, f"{module} imports {foreign}"
        return
    mine = layer_name(module)
    if mine is None:
        return
    assert mine in LAYER_OF, f"{module}: give it a layer in {Path(__file__).name}"
    for name in imports(path):
        if name.startswith("pipeline.") and layer_name(name) in LAYER_OF:
            theirs = LAYER_OF[layer_name(name)]
            assert theirs <= LAYER_OF[mine], f"{module} (layer {LAYER_OF[mine]}) imports {name}"
        if name.startswith("data_prep."):
            known = any(name == part or name.startswith(part + ".") for part in CONTRACT)
            demo = module == "pipeline.demo"  # it calls the other half as a user would
            assert known or demo, f"{module} imports {name}; the contract is {sorted(CONTRACT)}"
        if name.split(".")[0] == "deepspeed":
            assert mine in MAY_NAME_DEEPSPEED, f"{module} names deepspeed"
        if LAYER_OF[mine] == 1:
            assert name.split(".")[0] != "torch", f"{module} imports torch"
        if LAYER_OF[mine] == 2:
            assert name not in FORBIDDEN_BELOW_SERVICES, f"{module} imports {name}"
            assert name != "os", f"{module} reads the environment"


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_sizes(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


def test_training_loop_fits_on_a_screen():
    tree = ast.parse((ROOT / "pipeline" / "trainer.py").read_text(encoding="utf-8"))
    (fit,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "fit")
    assert fit.end_lineno - fit.lineno < 60


def test_module_names_hide_nothing():
    dependencies = {"datasets", "tokenizers", "transformers", "deepspeed", "torch", "numpy", "rich"}
    for path in modules():
        name = path.parent.name if path.stem == "__init__" else path.stem
        assert name not in sys.stdlib_module_names - {"__main__"}, path
        assert name not in dependencies, path
        assert name not in ("utils", "common", "helpers"), path


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("data_prep.cli", ("torch", "transformers", "datasets", "pyarrow")),
        ("data_prep.shards", ("torch", "sentencepiece")),
        ("pipeline.config_loading", ("torch", "deepspeed", "transformers")),
        ("pipeline.ds_config", ("torch", "deepspeed", "transformers")),
        ("pipeline.train", ("torch", "deepspeed", "transformers")),
    ],
)
def test_imports_stay_cheap(module, forbidden):
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_packages_are_named_exactly():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == "deberta-pretrain"
    assert "Private :: Do Not Upload" in project["project"]["classifiers"]
    include = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert include == ["data_prep", "data_prep.*", "pipeline", "pipeline.*"]


def test_constraints_pin_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    for requirement in wanted:
        name = requirement.split("[")[0]
        for separator in "<>=":
            name = name.split(separator)[0]
        if name != "deberta-pretrain":
            assert name.strip().lower() in pinned, name
