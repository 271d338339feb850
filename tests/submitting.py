"""Recipes in a folder of their own, as a person would have them."""

import shutil
import textwrap

from tests.worlds import ROOT

PLAIN_PRETRAIN = """#!/bin/bash
# A stand-in.
#SBATCH --job-name=deberta-pretrain
#SBATCH --nodes=1                   # of the run
#SBATCH --signal=B:USR1@180         # time to commit
#SBATCH --requeue
set -euo pipefail
printf "%s\\n" "$CONFIG"
"""

RECIPE = """
[run]
folder = "runs/mine"

[pretrain]
config = "demo"
deepspeed_config = "ds.json"
dataset = "dataset"
nodes = 2
gpus_per_node = 0
ntasks_per_node = 2
"""
DEEPSPEED = """{"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4,
"gradient_clipping": 1.0, "bf16": {"enabled": false}, "zero_optimization": {"stage": 1}}"""


def write_recipe(folder, text=RECIPE):
    """recipe.toml and ds.json in a folder; the recipe's path."""
    (folder / "ds.json").write_text(DEEPSPEED)
    path = folder / "recipe.toml"
    path.write_text(textwrap.dedent(text))
    return path


def copy_scripts(home):
    """HOME/slurm with the project's scripts and a stand-in for training; HOME."""
    target = home / "slurm"
    target.mkdir(parents=True)
    for pattern in ("*.sbatch", "*.sh", "*.env"):
        for path in (ROOT / "slurm").glob(pattern):
            shutil.copy(path, target)
    (target / "pretrain.sbatch").write_text(PLAIN_PRETRAIN)
    return home
