"""The files of a cluster's configuration; each line that deviates from SLURM's own says why."""

import os

CONTROLLER_PORT, NODE_PORT = 6817, 6818

_TEMPLATE = """\
ClusterName=test
SlurmctldHost={controller}({controller_address})
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job is held until its credential has expired, 120 s by default.
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
# As on real clusters: a step's processes die with its task, and a signal reaches the task alone.
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
# Without memory, no job must ask for it.
SelectTypeParameters=CR_Core
# Nodes have more cores than the machine.
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
# A node that was dead is used again once it is back.
ReturnToService=2
JobRequeue=1
KillWait=5
OverTimeLimit=0
# Ended jobs stay visible.
MinJobAge=3600
# The death of a node is noticed within 20 s.
SlurmdTimeout=10
TCPTimeout=2
MessageTimeout=5
# A step that ends while the controller is down says so again after 60 s; a node that waits for it
# longer than this drains itself.
UnkillableStepTimeout=120
BatchStartTimeout=5
GresTypes=gpu
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{settings}
{nodes}
PartitionName=batch Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=10 \
PreemptMode=REQUEUE GraceTime={grace_seconds}
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
"""


def configuration_files(folder, controller, nodes, hosts, gpus, cpus, grace_seconds, settings):
    """Write slurm.conf, gres.conf and cgroup.conf, and make the GPUs' device files.

    Args:
        folder: The cluster's; made.
        controller: Host of slurmctld.
        nodes: Hosts of slurmds.
        hosts: Know the addresses.
        gpus: Of each node.
        cpus: Of each node.
        grace_seconds: Between preemption's signal and its kill.
        settings: More lines of slurm.conf.
    """
    for name in ("etc", "state", "log", "run", "dev", *(f"spool.{node}" for node in nodes)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(gpus):
        # slurmd insists on device files; these are /dev/null's.
        os.mknod(folder / f"dev/gpu{index}", 0o666 | 0o020000, os.makedev(1, 3))
    lines = [
        f"NodeName={node} NodeAddr={hosts.address(node)} CPUs={cpus} RealMemory=8000"
        + (f" Gres=gpu:{gpus}" if gpus else "")
        for node in nodes
    ]
    text = _TEMPLATE.format(
        controller=controller,
        controller_address=hosts.address(controller),
        controller_port=CONTROLLER_PORT,
        node_port=NODE_PORT,
        folder=folder,
        nodes="\n".join(lines),
        names=",".join(nodes),
        grace_seconds=grace_seconds,
        settings=settings,
    )
    (folder / "etc/slurm.conf").write_text(text)
    # Named, because slurmd's own search asks for a mount that it does not need.
    (folder / "etc/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    devices = f"NodeName={','.join(nodes)} Name=gpu File={folder}/dev/gpu[0-{gpus - 1}]\n"
    (folder / "etc/gres.conf").write_text(devices if gpus else "")
