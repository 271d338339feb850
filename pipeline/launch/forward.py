"""Which variables ranks on other hosts get, and the file from which DeepSpeed reads them.

DeepSpeed 0.19.8 (launcher/runner.py) splits every line of that file at `=`: a comment or a blank
line ends it with a ValueError. It writes the values into a shell's command line on the other hosts,
in double quotes at most: what a shell would change is refused here.
"""

import re
from collections.abc import Mapping

from data_prep.errors import UserError

PREFIXES = ("DEBERTA_", "DS_", "GLOO_", "HF_", "MKL_", "NCCL_", "OMP_", "TORCH_", "TRITON_")
NAMES = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_HOME", "TOKENIZERS_PARALLELISM")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|_KEY")
_NAME = re.compile(r"[A-Za-z_]\w*")
PLAIN = re.compile(r"[\w@%+=:,./-]*", re.ASCII)
"""What no shell and no launcher changes."""


def forwarded(variables: Mapping[str, str], more: list[str]) -> dict[str, str]:
    """Choose what goes to the other hosts.

    Args:
        variables: Of this process.
        more: Names that the user wants there, too.

    Returns:
        Name -> value, sorted; secrets only where `more` names them.

    Raises:
        UserError: A name is not set, or a value would not arrive as it is.
    """
    if unset := [name for name in more if name not in variables or not _NAME.fullmatch(name)]:
        raise UserError(f"--export {unset[0]}: there is no such variable; set it before")
    chosen = {
        name: value
        for name, value in sorted(variables.items())
        if name in more
        or ((name in NAMES or name.startswith(PREFIXES)) and not _SECRET.search(name))
    }
    for name, value in chosen.items():
        if not PLAIN.fullmatch(value):
            raise UserError(
                f"{name}={value!r} would not reach the other hosts as it is: a launcher writes it "
                "into their shells' command lines; unset it, or set it on each host"
            )
    return {name: value for name, value in chosen.items() if value}


def deepspeed_env(variables: Mapping[str, str]) -> str:
    """Write variables as DeepSpeed reads them.

    Args:
        variables: What `forwarded` returned.

    Returns:
        The text of a `.deepspeed_env`.
    """
    return "".join(f"{name}={value}\n" for name, value in variables.items())
