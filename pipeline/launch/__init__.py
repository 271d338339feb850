"""Training on several hosts without a batch system, by the launchers that exist.

hosts      `n1:8,n2:8`, and the hostfile that launchers read
forward    which variables go to the other hosts, and the file that says so
commands   what each launcher is started with
supervise  watches state.json: a launcher may hang, and ends with 0 while ranks go on
"""
