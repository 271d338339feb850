"""GPU types: memory, rates and links, by the vendors' data sheets.

What a network reaches of them is assumed in `pipeline.plan.speed`. A bandwidth between nodes is
that of the network cards, one a GPU, all of which a ring of NCCL uses.
"""

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
    """As the driver reports it, or the beginning of that."""
    memory_bytes: int
    """What torch reports as the total."""
    fp32_flops: float
    """Rate of fp32 without tensor cores."""
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """What a ring of NCCL reaches between GPUs of a node: 0.4 of NVLink's both directions, or PCIe
    in one direction."""

    @property
    def bf16_flops(self) -> float:
        """Dense bf16 rate, which is the fp16 rate."""
        rate = peak_flops(self.name)
        assert rate is not None, f"{self.name} is not in PEAK_DENSE_BF16_FLOPS"
        return rate


GPUS = (
    Gpu("h100", "NVIDIA H100", int(79.1 * _GIB), 67e12, 3.35e12, 360e9),
    Gpu("h100-nvl", "NVIDIA H100 NVL", int(93.1 * _GIB), 60e12, 3.9e12, 240e9),
    Gpu("h100-pcie", "NVIDIA H100 PCIe", int(79.1 * _GIB), 51e12, 2.0e12, 50e9),
    Gpu("h200", "NVIDIA H200", int(139.8 * _GIB), 67e12, 4.8e12, 360e9),
    Gpu("b200", "NVIDIA B200", int(178.3 * _GIB), 75e12, 8.0e12, 720e9),
    Gpu("a100", "NVIDIA A100-SXM4-80GB", int(79.2 * _GIB), 19.5e12, 2.04e12, 240e9),
    Gpu("a100-40", "NVIDIA A100-SXM4-40GB", int(39.4 * _GIB), 19.5e12, 1.56e12, 240e9),
    Gpu("l40s", "NVIDIA L40S", int(44.4 * _GIB), 91.6e12, 0.864e12, 25e9),
)


def gpu_type(key: str) -> Gpu:
    """Look up a GPU type.

    Args:
        key: As "h100", in any case.

    Returns:
        The type.

    Raises:
        UserError: There is none of that name.
    """
    types = {gpu.key: gpu for gpu in GPUS}
    if key.lower() not in types:
        known = ", ".join(types)
        raise UserError(f"--gpu {key}: no such GPU type{nearest(key, types)} (known: {known})")
    return types[key.lower()]


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
            UserError: The last node would not be full.
        """
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
