"""Looks at what lies between nodes: interfaces, bandwidth, clocks and versions of all ranks.

Ranks first write their names into a store that rank 0 keeps. So rank 0 can say who did not come,
before a process group, which could not, waits for everybody.
"""

import socket
import statistics
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import (
    DistError,  # pyright: ignore[reportPrivateImportUsage]
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from data_prep.errors import UserError
from pipeline.preflight.disk import judge_clock
from pipeline.preflight.finding import Finding
from pipeline.runtime import World, environment
from pipeline.slurm_ranks import expand_node_list

PATIENCE_SECONDS = 25.0
_LOOK_SECONDS = 0.2
_ROUNDS = 3
_CPU_BYTES, _GPU_BYTES = 16 << 20, 256 << 20
_LOOPBACK_BYTES = 64 << 20
_VERSIONS = ("deberta-pretrain", "torch", "deepspeed", "numpy", "safetensors", "python", "device")
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def look_at_interfaces(node: str, variables: Mapping[str, str]) -> list[Finding]:
    """See whether the network interfaces that the settings name are there.

    Args:
        node: This node's name.
        variables: Of the process.

    Returns:
        One finding for each name that is wrong.
    """
    there = [name for _, name in socket.if_nameindex()]
    findings = []
    for variable in _INTERFACES:
        value = variables.get(variable, "")
        is_exact = variable.startswith("GLOO") or value.startswith("=")
        wanted = [name for name in value.removeprefix("=").split(",") if name]
        if value.startswith("^") or not wanted:
            continue
        if not any(
            name == w or (not is_exact and name.startswith(w)) for w in wanted for name in there
        ):
            findings.append(
                Finding(
                    *(node, "network", False),
                    f"{variable}={value}, and this node has {', '.join(there)}",
                    "correct DEBERTA_NETWORK_INTERFACE in slurm/site.env",
                )
            )
    return findings


def look_at_loopback(node: str) -> Finding:
    """Send bytes to ourselves: all that one process can see of a network.

    Args:
        node: This node's name.

    Returns:
        The finding.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        sender = threading.Thread(target=_send, args=(server.getsockname(),), daemon=True)
        began = time.perf_counter()
        sender.start()
        received = 0
        with server.accept()[0] as connection:
            while part := connection.recv(1 << 20):
                received += len(part)
        seconds = time.perf_counter() - began
    text = (
        f"loopback alone, {received * 8 / seconds / 1e9:.1f} Gbit/s: one process cannot look "
        "between nodes (srun --ntasks-per-node=1 deberta doctor --node)"
    )
    return Finding(node, "network", True, text)


def _send(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(bytes(_LOOPBACK_BYTES))


@dataclass(frozen=True)
class _Peer:
    """What a rank tells the others."""

    node: str
    unix_seconds: float
    versions: dict[str, str]


def look_at_peers(node: str, world: World, variables: Mapping[str, str]) -> list[Finding]:
    """Meet the other ranks and compare; a collective.

    Args:
        node: This node's name.
        world: This process's place, of several.
        variables: Of the process, with the launcher's.

    Returns:
        What concerns this node; on rank 0 also what concerns all, and who did not come.
    """
    address = f"{variables['MASTER_ADDR']}:{variables['MASTER_PORT']}"
    try:
        store = TCPStore(
            *(variables["MASTER_ADDR"], int(variables["MASTER_PORT"]), world.world_size),
            is_master=world.is_main,
            timeout=timedelta(seconds=PATIENCE_SECONDS),
            wait_for_workers=False,
        )
        absent = _who_is_absent(store, node, world)
        if absent:
            return [_absent(rank, world, variables) for rank in absent] if world.is_main else []
        return _together(node, world, PrefixStore("group", store))
    except (RuntimeError, DistError, OSError) as error:
        reason = str(error).splitlines()[0]
        cure = "see firewalls, DEBERTA_NETWORK_INTERFACE in slurm/site.env, and this node's cables"
        return [Finding(node, "network", False, f"rank 0 at {address}: {reason}", cure)]


def _who_is_absent(store: TCPStore, node: str, world: World) -> list[int]:
    """Rank 0 waits for the others and tells them; returns the ranks that did not come."""
    store.set(f"here-{world.rank}", node)
    if not world.is_main:
        store.wait(["verdict"], timedelta(seconds=2 * PATIENCE_SECONDS))
        return [int(rank) for rank in store.get("verdict").decode().split()]
    deadline = time.monotonic() + PATIENCE_SECONDS
    absent = [*range(world.world_size)]
    while absent and time.monotonic() < deadline:
        absent = [rank for rank in absent if not store.check([f"here-{rank}"])]
        time.sleep(_LOOK_SECONDS if absent else 0)
    store.set("verdict", " ".join(map(str, absent)))
    return absent


def _absent(rank: int, world: World, variables: Mapping[str, str]) -> Finding:
    """Name the node of a rank that did not come."""
    try:
        nodes = expand_node_list(variables.get("SLURM_STEP_NODELIST", ""))
    except UserError:
        nodes = []
    name = nodes[rank] if len(nodes) == world.world_size else f"rank {rank}"
    text = f"did not reach rank 0 at {variables['MASTER_ADDR']} in {PATIENCE_SECONDS:.0f} s"
    return Finding(name, "network", False, text, "see its own lines; drain the node")


def _together(node: str, world: World, store: PrefixStore) -> list[Finding]:
    """Measure and compare, now that all are there."""
    is_cuda = world.device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(world.device)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.world_size,
        timeout=timedelta(seconds=PATIENCE_SECONDS),
    )
    try:
        group = dist.new_group(backend="gloo") if is_cuda else dist.group.WORLD
        assert not isinstance(group, int), "this rank belongs to every group"
        speed = _all_reduce(node, world)
        dist.barrier(group=group)
        mine = _Peer(node, time.time(), {k: v for k, v in environment().items() if k in _VERSIONS})
        peers: list[_Peer] = [mine] * world.world_size
        dist.all_gather_object(peers, mine, group=group)
    finally:
        dist.destroy_process_group()
    compared = [*compare_clocks(peers), *compare_versions(peers)]  # the same on all ranks
    return [speed, *(finding for finding in compared if finding.node == node)]


def _all_reduce(node: str, world: World) -> Finding:
    """Time all-reduces and check their sum."""
    is_cuda, size = world.device.type == "cuda", world.world_size
    count = (_GPU_BYTES if is_cuda else _CPU_BYTES) // 4
    values = torch.empty(count, device=world.device)
    began, is_right = 0.0, False
    for each in range(1 + _ROUNDS):  # the first one connects
        values.fill_(world.rank + 1)
        if each == 1:
            began = time.perf_counter()
        dist.all_reduce(values)
        is_right = bool((values == size * (size + 1) / 2).all())  # waits for the device, too
    seconds = (time.perf_counter() - began) / _ROUNDS
    gbit = 2 * (size - 1) / size * count * 4 * 8 / seconds / 1e9
    backend = "NCCL" if is_cuda else "gloo"
    text = f"{backend} all-reduce over {size} ranks, {gbit:.1f} Gbit/s each way"
    if size == 1:
        text = f"{backend} all-reduce of one rank, in {1000 * seconds:.1f} ms"
    if is_right:
        return Finding(node, "network", True, text)
    return Finding(node, "network", False, f"{text}, with a wrong sum", "drain the node")


def compare_clocks(peers: list[_Peer]) -> list[Finding]:
    """Compare the clocks of all nodes behind a barrier.

    Args:
        peers: What all ranks have told.

    Returns:
        One finding for each clock that is off; one that speaks of all where none is.
    """
    usual = statistics.median(peer.unix_seconds for peer in peers)
    findings = [judge_clock(p.node, p.unix_seconds - usual, "the others' median") for p in peers]
    wrong = [finding for finding in findings if not finding.ok]
    furthest = max(abs(peer.unix_seconds - usual) for peer in peers)
    text = f"all {len(peers)} ranks within {furthest:.2f} s of their median"
    return wrong or [Finding(peers[0].node, "clock", True, text)]


def compare_versions(peers: list[_Peer]) -> list[Finding]:
    """Compare what is installed on all nodes.

    Args:
        peers: What all ranks have told, rank 0 first.

    Returns:
        One finding for each node that differs from the most common; or one for all.
    """
    told = [tuple(sorted(peer.versions.items())) for peer in peers]
    usual = dict(statistics.mode(told))
    findings = []
    for peer in peers:
        wrong = [name for name, value in peer.versions.items() if usual.get(name) != value]
        if wrong:
            text = ", ".join(f"{n} {peer.versions[n]} (elsewhere {usual.get(n)})" for n in wrong)
            cure = "use one installation or container image on all nodes (DEBERTA_SETUP)"
            findings.append(Finding(peer.node, "versions", False, text, cure))
    text = f"the same on {len(peers)} ranks: torch {usual['torch']}, deepspeed {usual['deepspeed']}"
    return findings or [Finding(peers[0].node, "versions", True, text)]
