"""Hosts of one machine: each with its own address, name, processes, /run and shared memory.

    Hosts(folder, names)   a context manager; a switch that nobody sees joins the hosts
    .run_on .popen_on      a command on a host; the file system is the machine's
    .kill .start           a power cut without a last word on the network, and the way back
    .link .drop            an unplugged cable; packets that vanish in one direction
    .start_sshd            ssh between the hosts, with keys and settings of its own

A host is a process in namespaces of its own (`host.sh`), so that nothing of it outlives it: no
daemon, no entry in /run/netns or /etc. It ends when this process does, by `kill -9` too. Addresses
are 10.77.0.N inside the hosts and nowhere else, so that several sets of hosts live side by side.
"""

import contextlib
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import psutil

CLIENT_TIMEOUT_SECONDS = 60
SWITCH = "switch"
_INIT = Path(__file__).with_name("host.sh")
_NAMESPACES = ("--net", "--uts", "--mount", "--pid")
_COUNTER = itertools.count()


def why_there_can_be_no_hosts():
    """What the machine lacks, and the cure; empty where hosts can be made."""
    if os.geteuid() != 0:
        return "hosts are namespaces, which only root may make: run as root"
    if missing := [name for name in ("ip", "unshare", "nsenter") if not shutil.which(name)]:
        return f"{', '.join(missing)} not found: apt-get install iproute2 util-linux"
    probe = [
        "unshare",
        *_NAMESPACES,
        "--fork",
        "--mount-proc",
        "ip",
        "link",
        "add",
        "type",
        "bridge",
    ]
    tried = subprocess.run(probe, capture_output=True, text=True, timeout=CLIENT_TIMEOUT_SECONDS)
    if tried.returncode:
        return f"namespaces cannot be made here ({tried.stderr.strip()}): CAP_SYS_ADMIN is needed"
    return ""


def unique_prefix():
    """A name for hosts that no other living process uses: this process's id in letters.

    SLURM's control groups lie under names of nodes, which all clusters of a machine share.
    """
    digits = "".join(chr(ord("a") + int(digit)) for digit in str(os.getpid()))
    return f"t{digits}{chr(ord('a') + next(_COUNTER) % 26)}"


def owner_of(prefix):
    """The process id that `unique_prefix` was called in."""
    return int("".join(str(ord(letter) - ord("a")) for letter in prefix[1:-1]))


class Hosts:
    """Hosts that see each other by name and by address; nobody else does."""

    def __init__(self, folder, names):
        self.folder = Path(folder)
        self.names = list(names)
        self._inits = {}

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{self.address(name)} {name}\n" for name in self.names]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        try:
            self._start_process(SWITCH)
            self._in(SWITCH, "ip", "link", "add", "br0", "type", "bridge")
            self._in(SWITCH, "ip", "link", "set", "br0", "up")
            for name in self.names:
                self.start(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End every process of every host."""
        for name in reversed(list(self._inits)):
            self._end(name)

    def address(self, name):
        """Inside the hosts."""
        return f"10.77.0.{self.names.index(name) + 1}"

    def start(self, name):
        """Switch a host on; nothing runs on it but its first process."""
        process = self._start_process(name)
        port = self._port(name)
        ends = ["ip", "link", "add", port, "type", "veth", "peer", "name", "eth0"]
        # A machine that comes back has its old network card: the others remember it.
        card = f"02:00:00:00:00:{self.names.index(name) + 1:02x}"
        self._in(SWITCH, *ends, "address", card, "netns", str(process.pid))
        self._in(SWITCH, "ip", "link", "set", port, "master", "br0", "up")
        self._in(name, "ip", "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        self._in(name, "ip", "link", "set", "eth0", "up")

    def kill(self, name):
        """A power cut: the cable is dead first, so that no peer is told that connections end."""
        self.link(name, up=False)
        self._end(name)
        # The kernel removes the port with the host, but at leisure; the host may come back sooner.
        self.run_on(SWITCH, ["ip", "link", "delete", self._port(name)])

    def link(self, name, up):
        """Plug or unplug a host's cable."""
        self._in(SWITCH, "ip", "link", "set", self._port(name), "up" if up else "down")

    def drop(self, source, target, on=True):
        """Lose silently, or no longer, what `source` sends to `target`."""
        table = "table inet lost"
        rules = f"""add {table}; delete {table}; add {table}
            add chain inet lost out {{ type filter hook output priority 0; }}
            add rule inet lost out ip daddr {self.address(target)} drop"""
        self._in(source, "nft", rules if on else f"add {table}; delete {table}")

    def command(self, name, argv, folder=None):
        """The words that run a command on a host; signals to them do not reach the command."""
        # The switch's words name other hosts' processes as this machine counts them.
        namespaces = _NAMESPACES[:1] if name == SWITCH else _NAMESPACES
        where = ["nsenter", "--target", str(self._inits[name][1].pid), *namespaces, "--"]
        return [*where, "env", "-C", str(folder or Path.cwd()), *map(str, argv)]

    def run_on(self, name, argv, **options):
        """Run a command to its end.

        Args:
            name: The host.
            argv: Words.
            options: Of `subprocess.run`; `cwd` is a folder on the host.

        Returns:
            subprocess.CompletedProcess with text in stdout and stderr.
        """
        defaults = {"capture_output": True, "text": True, "timeout": CLIENT_TIMEOUT_SECONDS}
        if "stdout" in options or "stderr" in options:
            del defaults["capture_output"]
        argv = self.command(name, argv, options.pop("cwd", None))
        return subprocess.run(argv, stdin=subprocess.DEVNULL, **(defaults | options))

    def popen_on(self, name, argv, **options):
        """Start a command; to end it, signal it on its host."""
        argv = self.command(name, argv, options.pop("cwd", None))
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, text=True, **options)

    def start_sshd(self):
        """Let root log in from each host to each other; nothing of the machine's ssh is touched."""
        ssh = self.folder / "ssh"
        ssh.mkdir(mode=0o700, exist_ok=True)
        for key in ("id", "host"):
            if not (ssh / key).exists():
                words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / key)]
                subprocess.run(words, check=True, timeout=CLIENT_TIMEOUT_SECONDS)
        shutil.copy(ssh / "id.pub", ssh / "authorized_keys")
        (ssh / "ssh_config").write_text(
            "Host *\n IdentityFile /etc/ssh/id\n StrictHostKeyChecking no\n"
            " UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
        )
        (ssh / "sshd_config").write_text(
            "HostKey /etc/ssh/host\nAuthorizedKeysFile /etc/ssh/authorized_keys\nStrictModes no\n"
            "UsePAM no\nPermitRootLogin prohibit-password\nMaxStartups 100\n"
        )
        for name in self.names:
            self._in(name, "mount", "--bind", str(ssh), "/etc/ssh")
            self._in(name, "/usr/sbin/sshd", "-E", str(self.folder / f"sshd.{name}.log"))

    def _port(self, name):
        return f"port{self.names.index(name)}"

    def _in(self, name, *argv):
        done = self.run_on(name, argv)
        assert done.returncode == 0, f"on {name}: {' '.join(argv)}: {done.stderr}"
        return done.stdout

    def _start_process(self, name):
        """Process 1 of a host, as this machine sees it."""
        words = ["unshare", *_NAMESPACES, "--fork", "--kill-child=KILL", "--mount-proc"]
        owner = subprocess.Popen(
            [*words, str(_INIT), name, str(self.folder / "hosts")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a terminal's interrupt is for the tests, not for the hosts
        )
        assert owner.stdout is not None
        if (said := owner.stdout.readline()) != "ready\n":
            said += owner.communicate(timeout=CLIENT_TIMEOUT_SECONDS)[0]
            raise RuntimeError(f"host {name} cannot be made: {said}")
        (process,) = psutil.Process(owner.pid).children()
        self._inits[name] = (owner, process)
        return process

    def _end(self, name):
        owner, process = self._inits.pop(name)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        owner.communicate(
            timeout=CLIENT_TIMEOUT_SECONDS
        )  # once every process of the host has ended
