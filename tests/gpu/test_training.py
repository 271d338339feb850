"""Training, resuming and exporting by the programs that users start, on one GPU.

They need what training needs, DeepSpeed included; on a machine without it they are left out.
"""

import math
import signal
from importlib.util import find_spec

import pytest

from tests.worlds import largest_difference, rows, train, train_and_kill

MISSING = [name for name in ("deepspeed", "zstandard", "tensorboard") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

# fp32 on two devices: other summation orders, twelve Adam steps, no flipped draw.
DEVICE_TOLERANCE = 1e-3


@pytest.fixture
def run_json(deepspeed_json):
    """Precision -> DeepSpeed JSON of ZeRO-1."""

    def write(precision, initial_scale_power=8):
        if precision != "fp16":
            return deepspeed_json(1, precision=precision)
        fp16 = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": initial_scale_power,
            "loss_scale_window": 100,
            "hysteresis": 1,
        }
        return deepspeed_json(1, fp16=fp16, data_types={"grad_accum_dtype": "fp32"})

    return write


def commit_exists(folder, step):
    return lambda: (folder / "checkpoints" / f"step-{step:08d}").is_dir()


@pytest.mark.usefixtures("on_gpu")
def test_gpu_and_cpu_train_alike(tiny_run, run_json, dataset_folder, tmp_path, monkeypatch):
    config, ds = tiny_run(), run_json("fp32")
    code, output = train(config, ds, dataset_folder, tmp_path / "gpu")
    assert code == 0, output
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    code, output = train(config, ds, dataset_folder, tmp_path / "cpu")
    assert code == 0, output
    left, right = (
        [{key: row[key] for key in row if key.endswith("_loss")} for row in rows(tmp_path / where)]
        for where in ("cpu", "gpu")
    )
    assert len(left) >= 4
    assert largest_difference(left, right) < DEVICE_TOLERANCE


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_killed_on_a_gpu_a_run_goes_on_bit_for_bit(
    precision, tiny_run, run_json, dataset_folder, tmp_path
):
    config, ds = tiny_run(dropout=0.1), run_json(precision)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    code, output = train(config, ds, dataset_folder, undisturbed)
    assert code == 0, output
    arguments = (config, ds, dataset_folder, killed)
    code, output = train_and_kill(commit_exists(killed, 4), signal.SIGKILL, *arguments)
    assert code != 0, output
    code, output = train(*arguments)
    assert code == 0, output
    assert rows(killed) == rows(undisturbed)
    for network in ("generator", "discriminator"):
        name = f"checkpoints/step-00000012/{network}/rank-00000.safetensors"
        assert (killed / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.usefixtures("on_gpu")
def test_fp16_skips_what_overflows_and_then_learns(tiny_run, run_json, dataset_folder, tmp_path):
    # 2^32 times any gradient overflows fp16; every skipped step halves the scale.
    words = ("schedule.max_steps=60", "schedule.max_consecutive_skipped_steps=40")
    arguments = (tiny_run(), run_json("fp16", 32), dataset_folder, tmp_path / "run", *words)
    code, output = train(*arguments)
    assert code == 0, output
    steps = [row for row in rows(tmp_path / "run") if "train/mlm_loss" in row]
    for network in ("generator", "discriminator"):
        skipped = [row[f"optim/{network}_skipped_steps"] for row in steps]
        assert skipped[0] == steps[0]["step"]
        assert skipped[-1] == skipped[-2] < steps[-1]["step"]
    assert all(math.isfinite(row["train/mlm_loss"]) for row in steps)
    assert steps[-1]["train/mlm_loss"] < steps[0]["train/mlm_loss"]


@pytest.mark.usefixtures("on_gpu")
def test_a_gpu_run_exports_what_it_trained(tiny_run, run_json, dataset_folder, tmp_path):
    from pipeline.export import export_run

    run = tmp_path / "run"
    code, output = train(tiny_run(), run_json("bf16"), dataset_folder, run)
    assert code == 0, output
    report = export_run(run, tmp_path / "export")
    assert report.step == 12
    assert {parity.network for parity in report.verification.parities} == set(report.parameters)
    assert all(p.max_difference <= p.tolerance for p in report.verification.parities)
