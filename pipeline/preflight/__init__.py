"""Whether a node can train: looked at before a job begins, in less than a minute.

finding     what one look has shown: ok, or what is wrong and what helps
gpu         visible, free, the right answer, as fast as its neighbours; ECC and driver
disk        room, inodes, writing, syncing and reading of the run folder and of scratch
network     interfaces, and all ranks together: bandwidth, clocks, versions
node        all of it
"""
