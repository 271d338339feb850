"""Whether this installation and this node can train: looked at in less than a minute.

finding        what one look has shown: ok, what would be better, or what is wrong and what helps
children       programs that a look starts
gpu            visible, free, the right answer, as fast as its neighbours; ECC and driver
disk           room, inodes, writing, syncing and reading of the run folder and of scratch
network        interfaces, and all ranks together: bandwidth, clocks, versions
node           those four: what a job looks at before it begins

packages       Python and packages in their ranges
deepspeed_ops  DeepSpeed, and what it compiles
gpu_software   torch's CUDA, abilities of the GPUs, Triton, other users
small_worlds   ranks on this host over gloo and NCCL
launchers      torchrun, deepspeed, pdsh, MPI, SLURM
shared_folder  renames, fsync, exclusive creation, locks, memory maps
host           memory, limits, temporary folders, clock, text
installation   all of it
"""
