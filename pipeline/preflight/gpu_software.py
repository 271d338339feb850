"""Looks at what lies between torch and the GPUs: builds, driver, abilities, Triton, other users.

`pipeline.preflight.gpu` looks at the GPUs themselves.
"""

import importlib.metadata
import importlib.util
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

from pipeline.modeling.kernels.serving import head_refusal
from pipeline.modeling.kernels.tile_table import architecture_of
from pipeline.preflight.children import ask
from pipeline.preflight.finding import Finding

_SMI_SECONDS = 20
_DEVICE_FILE = Path("/dev/nvidia0")
_KERNELS = "model.attention_backend=triton"


def look_at_build(node: str, variables: Mapping[str, str]) -> Finding:
    """See whether this torch was built for what is in the machine.

    Args:
        node: This node's name.
        variables: Of the process.

    Returns:
        The finding.
    """
    built = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
    has_device = _DEVICE_FILE.exists()
    if torch.version.cuda is None:
        if not has_device:
            return Finding(node, "cuda", True, f"torch {torch.__version__} for the CPU, and no GPU")
        return Finding(
            *(node, "cuda", False),
            f"torch {torch.__version__} is built for the CPU, and there is an NVIDIA GPU",
            "install torch for your driver, from the index that pytorch.org names",
        )
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore[reportAttributeAccessIssue]
        return Finding(node, "cuda", True, f"{built}, NCCL {nccl}, cuDNN {_cudnn()}")
    hidden = variables.get("CUDA_VISIBLE_DEVICES")
    if not has_device or hidden == "":
        why = "CUDA_VISIBLE_DEVICES is empty" if has_device else "no NVIDIA device"
        return Finding(node, "cuda", True, f"{built}; {why} here, as on a login node")
    return Finding(
        *(node, "cuda", False, f"{built} does not reach the GPU: {_reason()}"),
        "compare the driver's CUDA (nvidia-smi) with torch's; install the build for that driver",
    )


def _cudnn() -> str:
    return str(torch.backends.cudnn.version())


def _reason() -> str:
    """Why CUDA does not begin."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "no reason is told"


def look_at_abilities(node: str) -> list[Finding]:
    """See what each kind of visible GPU computes in, and whether our kernels serve it.

    Args:
        node: This node's name.

    Returns:
        A finding for each kind; none without a GPU.
    """
    if not torch.cuda.is_available():
        return []
    kinds: dict[tuple[str, tuple[int, int]], int] = {}
    for index in range(torch.cuda.device_count()):
        kind = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        kinds.setdefault(kind, index)
    findings = [_abilities(node, name, each, index) for (name, each), index in kinds.items()]
    if len(kinds) > 1:
        names = " and ".join(sorted({name for name, _ in kinds}))
        cure = "train on one kind (CUDA_VISIBLE_DEVICES): all ranks wait for the slowest"
        findings.append(Finding(node, "gpus", True, f"of several kinds: {names}", cure))
    return findings


def _abilities(node: str, name: str, capability: tuple[int, int], index: int) -> Finding:
    """Judge one kind."""
    check, number = f"{name}", f"{capability[0]}.{capability[1]}"
    built = torch.cuda.get_arch_list()
    if built and not any(_runs_on(each, capability) for each in built):
        text = f"compute capability {number}, and this torch is built for {', '.join(built)}"
        return Finding(node, check, False, text, "install a torch that names it (pytorch.org)")
    if capability < (8, 0):
        text = f"compute capability {number}: no bf16, and none of our kernels"
        cure = "train with ds_configs/zero2_fp16.json and model.attention_backend=torch"
        return Finding(node, check, True, text, cure)
    refusal = head_refusal(torch.device("cuda", index), torch.bfloat16)
    if refusal:
        cure = f"pip install 'deberta-pretrain[kernels]', or do without {_KERNELS}"
        return Finding(node, check, True, f"compute capability {number}, bf16; {refusal}", cure)
    text = f"compute capability {number}, bf16; kernels with the tiles of "
    return Finding(node, check, True, text + architecture_of(capability))


def _runs_on(built: str, capability: tuple[int, int]) -> bool:
    """Whether code for `sm_80` or `compute_90` runs on a GPU."""
    kind, _, digits = built.partition("_")
    number = "".join(filter(str.isdigit, digits))
    if len(number) < 2:
        return False
    theirs = int(number[:-1]), int(number[-1])
    # Machine code runs within its major version; text for the driver's compiler on all later ones.
    is_newer = theirs <= capability
    return is_newer and (kind == "compute" or theirs[0] == capability[0])


def look_at_triton(node: str) -> Finding:
    """See whether Triton can be imported.

    Args:
        node: This node's name.

    Returns:
        The finding.
    """
    has_gpu = torch.cuda.is_available()
    if importlib.util.find_spec("triton") is None:
        text = f"not installed; {_KERNELS} would fall back on torch"
        cure = "pip install 'deberta-pretrain[kernels]'" if has_gpu else ""
        return Finding(node, "triton", True, text, cure)
    try:
        importlib.import_module("triton")
    except Exception as error:
        text = f"cannot be imported: {type(error).__name__}: {error}"
        cure = "pip install -c constraints.txt triton, in the version that this torch asks for"
        return Finding(node, "triton", not has_gpu, text, cure)
    version = importlib.metadata.version("triton")
    return Finding(
        node, "triton", True, version if has_gpu else f"{version}, and no GPU to compile for"
    )


def look_at_processes(node: str, variables: Mapping[str, str]) -> list[Finding]:
    """Ask nvidia-smi who else computes on the GPUs; nothing where there is none.

    Args:
        node: This node's name.
        variables: Of the process.

    Returns:
        One warning for each GPU with other processes.
    """
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    query = "--query-compute-apps=gpu_uuid,pid,process_name,used_memory"
    answer = ask([program, query, "--format=csv,noheader,nounits"], variables, _SMI_SECONDS)
    if answer.code != 0:
        return []  # the driver's line says so
    others = defaultdict(list)
    for line in answer.output.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4 and cells[1] != str(os.getpid()):
            others[cells[0]].append(f"{cells[2]} ({cells[1]}, {cells[3]} MiB)")
    return [
        Finding(
            *(node, f"gpu {gpu}", True, f"is used by {', '.join(who)}"),
            "end them, or ask for GPUs of your own (--exclusive, --gpus-per-node)",
        )
        for gpu, who in others.items()
    ]
