"""GPU types: memory, rates and links.

What a network reaches of them is assumed in `pipeline.plan.speed`. A bandwidth between nodes is
that of the network cards, one a GPU, all of which a ring of NCCL uses.

Source: NVIDIA's data sheets for rates and links; the memory is what torch reports as the total,
which is less than what is sold. Where GPUs have NVLink in pairs alone, or none, a ring goes through
PCIe.
"""

import math
import re
from dataclasses import dataclass

from data_prep.errors import UserError
from pipeline.findings import nearest
from pipeline.flops import peak_flops

_GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One type of GPU."""

    key: str
    """What people type."""
    name: str
    """As the driver reports it, or the words that it begins with."""
    memory_bytes: int
    """What torch reports as the total."""
    fp32_flops: float
    """Rate of fp32 without tensor cores."""
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """What a ring of NCCL reaches between GPUs of a node: 0.4 of NVLink's both directions, or 0.8
    of PCIe in one direction."""
    is_ampere: bool = True
    """Ampere or newer: such GPUs compute in bf16 and run the fused kernels."""

    @property
    def half_flops(self) -> float:
        """Dense rate of the tensor cores: bf16, or fp16 where there is no bf16."""
        rate = peak_flops(self.name)
        assert rate is not None, f"{self.name} is not in PEAK_DENSE_FLOPS"
        return rate

    def is_type_of(self, device_name: str) -> bool:
        """Tell whether a device is of this type.

        Args:
            device_name: As the driver reports it.

        Returns:
            Whether this is the type whose name says most of it: an "NVIDIA H100 PCIe" is no
            "NVIDIA H100".
        """
        alike = [
            gpu
            for gpu in GPUS
            if device_name == gpu.name or device_name.startswith((f"{gpu.name} ", f"{gpu.name}-"))
        ]
        return bool(alike) and max(alike, key=lambda gpu: len(gpu.name)) == self


_NVLINK_5, _NVLINK_4, _NVLINK_3, _NVLINK_2 = 720e9, 360e9, 240e9, 120e9
_PCIE_5, _PCIE_4, _PCIE_3 = 50e9, 25e9, 12.5e9

GPUS = (
    Gpu("h100", "NVIDIA H100", int(79.1 * _GIB), 67e12, 3.35e12, _NVLINK_4),
    Gpu("h100-nvl", "NVIDIA H100 NVL", int(93.1 * _GIB), 60e12, 3.9e12, _PCIE_5),
    Gpu("h100-pcie", "NVIDIA H100 PCIe", int(79.1 * _GIB), 51e12, 2.0e12, _PCIE_5),
    Gpu("h200", "NVIDIA H200", int(139.8 * _GIB), 67e12, 4.8e12, _NVLINK_4),
    Gpu("b200", "NVIDIA B200", int(178.3 * _GIB), 75e12, 8.0e12, _NVLINK_5),
    Gpu("a100", "NVIDIA A100-SXM4-80GB", int(79.2 * _GIB), 19.5e12, 2.04e12, _NVLINK_3),
    Gpu("a100-40", "NVIDIA A100-SXM4-40GB", int(39.4 * _GIB), 19.5e12, 1.56e12, _NVLINK_3),
    Gpu("l40s", "NVIDIA L40S", int(44.4 * _GIB), 91.6e12, 0.864e12, _PCIE_4),
    Gpu("a6000", "NVIDIA RTX A6000", int(47.4 * _GIB), 38.7e12, 0.768e12, _PCIE_4),
    Gpu("a10", "NVIDIA A10", int(22.0 * _GIB), 31.2e12, 0.6e12, _PCIE_4),
    Gpu("l4", "NVIDIA L4", int(22.0 * _GIB), 30.3e12, 0.3e12, _PCIE_4),
    Gpu("rtx4090", "NVIDIA GeForce RTX 4090", int(23.6 * _GIB), 82.6e12, 1.008e12, _PCIE_4),
    Gpu("rtx3090", "NVIDIA GeForce RTX 3090", int(23.6 * _GIB), 35.6e12, 0.936e12, _PCIE_4),
    Gpu("v100", "Tesla V100-SXM2-32GB", int(31.7 * _GIB), 15.7e12, 0.9e12, _NVLINK_2, False),
    Gpu("t4", "Tesla T4", int(14.5 * _GIB), 8.1e12, 0.32e12, _PCIE_3, False),
)


def gpu_type(key: str) -> Gpu:
    """Look up a GPU type.

    Args:
        key: As "h100" or "H-100".

    Returns:
        The type.

    Raises:
        UserError: There is none of that name.
    """
    types = {gpu.key: gpu for gpu in GPUS}
    plain = {name.replace("-", ""): gpu for name, gpu in types.items()}
    found = plain.get(re.sub(r"[-_ ]", "", key.lower()))
    if found is None:
        known = ", ".join(types)
        raise UserError(f"--gpu {key}: no such GPU type{nearest(key, types)} (known: {known})")
    return found


@dataclass(frozen=True)
class Cluster:
    """GPUs of one type in nodes."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    network_bits_per_second: float
    """Of one GPU's network card."""

    @classmethod
    def of(cls, gpu: Gpu, num_gpus: int, gpus_per_node: int, network_gbit: float) -> "Cluster":
        """Check that nodes are full.

        Args:
            gpu: Their type.
            num_gpus: All of them.
            gpus_per_node: GPUs of a full node; fewer in all are one node.
            network_gbit: Gigabits a second of one GPU's network card.

        Returns:
            The cluster.

        Raises:
            UserError: The last node would not be full, or the network has no bandwidth.
        """
        if not 0 < network_gbit < math.inf:
            raise UserError(f"--network-gbit {network_gbit:g}: give Gbit/s of one GPU's card")
        if num_gpus > gpus_per_node and num_gpus % gpus_per_node:
            below = num_gpus - num_gpus % gpus_per_node
            raise UserError(
                f"--gpus {num_gpus} are no full nodes of --gpus-per-node {gpus_per_node}; the"
                f" nearest that are: {below}, {below + gpus_per_node}"
            )
        return cls(gpu, num_gpus, min(num_gpus, gpus_per_node), network_gbit * 1e9)

    @property
    def num_nodes(self) -> int:
        """Nodes."""
        return self.num_gpus // self.gpus_per_node

    @property
    def ring_bytes_per_second(self) -> float:
        """What each GPU sends on a ring through all nodes."""
        link = self.gpu.link_bytes_per_second
        if self.num_nodes == 1:
            return link
        return min(link, self.gpus_per_node * self.network_bits_per_second / 8)
