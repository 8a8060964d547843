"""A real Slurm of two virtual nodes on this machine: munged, slurmctld, two slurmd; without systemd, for these tests alone."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
MpiDefault=none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_port}-{last_port}] CPUs=2 RealMemory=2000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=60 PriorityTier=1 State=UP GraceTime=10
PartitionName=cheap Nodes=n[1-2] MaxTime=60 PriorityTier=1 State=UP GraceTime=0
PartitionName=urgent Nodes=n[1-2] MaxTime=60 PriorityTier=10 State=UP PreemptMode=OFF
"""
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster. Slurm's commands need `SLURM_CONF` in their environment."""

    root: Path
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def call(self, *command: str) -> str:
        """Runs one of Slurm's commands."""
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def start_node(self, name: str) -> None:
        """Starts the daemon of a node."""
        self.nodes[name] = _started("slurmd", "-D", "-N", name, "-f", str(self.root / "slurm.conf"))

    @contextmanager
    def node_lost(self, name: str) -> Iterator[None]:
        """All processes of a node are killed; it comes back at the end of the block."""
        daemon = psutil.Process(self.nodes[name].pid)
        for process in (daemon, *daemon.children(recursive=True)):
            process.kill()
        self.nodes[name].wait()
        self.call("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=lost")
        try:
            yield
        finally:
            self.start_node(name)
            self.call("scontrol", "update", f"NodeName={name}", "State=RESUME")
            self.wait_until_idle()

    def wait_until_idle(self) -> None:
        """Waits until both nodes can take jobs."""
        _wait(lambda: self._states() == ["idle", "idle"], "Slurm", self.root / "slurmctld.log")

    def _states(self) -> list[str]:
        listed = subprocess.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], capture_output=True, text=True)
        return listed.stdout.split()

    def wait_for(self, job_state: str, seconds: float = 60) -> list[str]:
        """Waits until some job is in a state; gives the numbers of those that are."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if jobs := self.call("squeue", "--noheader", "--array", "--format=%i", f"--states={job_state}").split():
                return jobs
            time.sleep(0.1)
        raise TimeoutError(f"no job became {job_state}: {self.call('squeue', '--array')}")


def missing() -> str:
    """Why there can be no Slurm here, or nothing."""
    if os.getuid() != 0:
        return "only root can start Slurm's daemons"
    paths = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    lost = [name for name in NEEDED if shutil.which(name, path=paths) is None]
    return (
        f"these programs are missing: {', '.join(lost)} (apt-get install slurmctld slurmd slurm-client munge)"
        if lost
        else ""
    )


@contextmanager
def slurm_cluster(root: Path) -> Iterator[SlurmCluster]:
    """Starts the daemons, sets `SLURM_CONF`, and ends them all."""
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    ports = _free_ports(4)
    conf = root / "slurm.conf"
    conf.write_text(
        CONF.format(host=socket.gethostname(), root=root, port=ports[0], node_port=ports[1], last_port=ports[1] + 1)
    )
    os.environ["SLURM_CONF"] = str(conf)
    cluster = SlurmCluster(root)
    servers: list[subprocess.Popen[bytes]] = []
    try:
        servers.append(_started_munge(root))
        servers.append(_started("slurmctld", "-D", "-f", str(conf)))
        for node in ("n1", "n2"):
            cluster.start_node(node)
        cluster.wait_until_idle()
        yield cluster
    finally:
        os.environ.pop("SLURM_CONF")
        processes = [*servers, *cluster.nodes.values()]
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _started_munge(root: Path) -> subprocess.Popen[bytes]:
    """munged trusts no key and no socket in a folder that others can write to; the system's munge user need not exist."""
    for folder in (root, *root.parents):
        if folder.stat().st_mode & 0o022 and not folder.stat().st_mode & 0o1000:
            folder.chmod(folder.stat().st_mode & ~0o022)
    key = root / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    root.chmod(0o755)
    arguments = {"key-file": key, "socket": root / "munge.socket", "pid-file": root / "munge.pid"}
    arguments |= {"log-file": root / "munge.log", "seed-file": root / "munge.seed"}
    process = _started("munged", "-F", "--force", *(f"--{name}={value}" for name, value in arguments.items()))
    _wait(lambda: (root / "munge.socket").exists(), "munged", root / "munge.log")
    return process


def _started(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _wait(condition: object, what: str, logfile: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.1)
    raise TimeoutError(f"{what} did not start: {logfile.read_text() if logfile.exists() else 'no log'}")


def _free_ports(count: int) -> list[int]:
    """The first of some neighbouring free ports, and the next."""
    while True:
        first = secrets.randbelow(20_000) + 20_000
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return list(range(first, first + count))
        except OSError:
            continue
