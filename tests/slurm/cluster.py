"""A real Slurm cluster of several nodes on this machine, in a temporary folder, for as long as a command runs.

    python tests/slurm/cluster.py bash                 # a shell in which sbatch, squeue, ... talk to it
    python tests/slurm/cluster.py --nodes 2 sinfo

Needs the programs of the Debian packages in `PACKAGES`, no configuration, no service manager and no control groups:
each node is a slurmd with a port and a folder of its own. Nothing outside the folder is touched, so that several
clusters live beside each other.
"""

import argparse
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")

CPUS = 8  # of each node, as Slurm counts them: they need not exist
GPUS = 2
SBIN = "/usr/sbin:/sbin"  # where Debian keeps the daemons, not on everybody's PATH

FIRST_NODE = 11
# Names of nodes must resolve, as rank 0 is found by the name of its node: addresses do everywhere on Linux. It listens
# at a port drawn from the number of its job, which must therefore differ between clusters on one machine.
CONF = """
ClusterName=tests
FirstJobId={controller_port}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until its credential has expired, 2 minutes by default and 5 seconds at least.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log

# No control groups, no pinning: the nodes share the machine's cores.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
ReturnToService=2

# Seconds where the default is minutes.
SlurmdTimeout=15
KillWait=5
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
MinJobAge=3600

# A job in "high" sends the signal of --signal to one in "low", which is requeued after the grace time.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=20 MaxTime=1:00:00
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=1:00:00
"""


def missing_programs() -> list[str]:
    """The programs that a cluster needs and that are not on this machine."""
    return [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]


class Cluster:
    """A running cluster, the nodes of which are called 127.0.0.11, 127.0.0.12, ...

    Args:
        folder: where everything is; open to others to enter, and its path a short one, as sockets are in it.
        num_nodes: so many.
    """

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"127.0.0.{FIRST_NODE + index}" for index in range(num_nodes)]
        self._ports = _free_ports(1 + num_nodes)
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{SBIN}"}
        for name in ("munge", "state", "run", "log", "devices", *(f"spool/{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True, mode=0o755)
        # A GPU without a device file would be dropped; any file whose name ends in a number will do.
        for index in range(GPUS):
            (folder / "devices" / f"gpu{index}").touch()
        lines = [f"NodeName={node} Name=gpu File={folder}/devices/gpu[0-{GPUS - 1}]\n" for node in self.nodes]
        (folder / "gres.conf").write_text("".join(lines))
        self._write_conf(preemption_warns=True)

    def _write_conf(self, preemption_warns: bool) -> None:
        host, memory = socket.gethostname().partition(".")[0], _memory_in_mb()
        conf = CONF.format(folder=self.folder, host=host, user=getpass.getuser(), controller_port=self._ports[0])
        if preemption_warns:
            conf += "SlurmctldParameters=preempt_send_user_signal\n"
        for node, port in zip(self.nodes, self._ports[1:], strict=True):
            conf += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} "
            conf += f"RealMemory={memory} Gres=gpu:{GPUS}\n"
        (self.folder / "slurm.conf").write_text(conf)

    # --- Its daemons ---

    def start(self) -> None:
        """Start the daemons and wait for the nodes."""
        munge = self.folder / "munge"
        (munge / "key").touch(0o600)  # munged refuses one that others can read
        (munge / "key").write_bytes(os.urandom(1024))
        self.run(
            "munged",
            *(f"--socket={munge}/socket", f"--key-file={munge}/key", f"--seed-file={munge}/seed"),
            *(f"--pid-file={self.folder}/run/munged.pid", f"--log-file={self.folder}/log/munged.log"),
        )
        self.run("slurmctld", "-f", self.env["SLURM_CONF"])
        for node in self.nodes:
            self.start_node(node)
        self.wait_for(lambda: self._node_states() == ["idle"] * len(self.nodes), "the nodes", seconds=30)

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-f", self.env["SLURM_CONF"], "-N", node)

    def kill_node(self, node: str) -> None:
        """End a node as a loss of power does: its daemon and all that it started are gone, without a message."""
        tasks = self.processes(SLURMD_NODENAME=node)
        _send(signal.SIGKILL, {self._pid(f"slurmd.{node}"), *map(_parent, tasks), *tasks})

    def preempt_with(self, *, warning: bool) -> None:
        """Whether preemption begins with the signal of a job's --signal, or with SIGTERM as is Slurm's default."""
        self._write_conf(warning)
        self.run("scontrol", "reconfigure")

    def stop(self) -> None:
        """Cancel all jobs and end the daemons; what does not end in time is killed."""
        with suppress(subprocess.SubprocessError, TimeoutError):
            self.run("scancel", "--user", getpass.getuser())
            self.wait_for(lambda: not self.run("squeue", "-h"), "jobs to end", seconds=15)
        daemons = {self._pid(name) for name in [*(f"slurmd.{node}" for node in self.nodes), "slurmctld", "munged"]}
        _send(signal.SIGTERM, daemons)
        deadline = time.monotonic() + 5
        while daemons & self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        _send(signal.SIGKILL, self.processes())

    def _pid(self, daemon: str) -> int:
        """The process of a daemon, 0 if there is none."""
        path = self.folder / "run" / f"{daemon}.pid"
        pid = int(path.read_text()) if path.exists() else 0
        return pid if pid in self.processes() else 0  # the number may be that of another by now

    def processes(self, **variables: str) -> set[int]:
        """The processes of this cluster, daemons and jobs, that have these variables in their environment."""
        variables["SLURM_CONF"] = self.env["SLURM_CONF"]
        wanted = {f"{name}={value}".encode() for name, value in variables.items()}
        found = set()
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if wanted <= set((path / "environ").read_bytes().split(b"\0")):
                    found.add(int(path.name))
        return found

    # --- Talking to it ---

    def run(self, *command: str) -> str:
        """Run a command of the cluster and return its standard output.

        Raises:
            subprocess.CalledProcessError: if it fails.
        """
        result = subprocess.run(command, env=self.env, check=True, stdout=subprocess.PIPE, text=True, timeout=60)
        return result.stdout.strip()

    def _node_states(self) -> list[str]:
        return self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split()

    def job(self, job_id: str) -> dict[str, str]:
        """What scontrol knows of a job: JobState, Restarts, NodeList, ..."""
        words = self.run("scontrol", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def log(self, job_id: str) -> str:
        """The lines of the controller's log that name a job."""
        lines = (self.folder / "log" / "slurmctld.log").read_text().splitlines()
        return "\n".join(line for line in lines if f"={job_id}" in line or f" {job_id}" in line)

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds} s for {what}\n{self.run('sinfo')}\n{self.run('squeue')}")
            time.sleep(0.2)


def _send(signum: signal.Signals, pids: set[int]) -> None:
    for pid in pids - {0}:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)


def _parent(pid: int) -> int:
    """The parent of a process; 0 if the process has gone, or has outlived its parent."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
    return parent if parent > 1 else 0


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _memory_in_mb() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


@contextmanager
def running_cluster(num_nodes: int) -> Iterator[Cluster]:
    """A cluster for as long as the body runs."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own folders are closed to others: munged would complain
    folder.chmod(0o755)
    cluster = Cluster(folder, num_nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="A Slurm cluster on this machine, for as long as a command runs")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if missing := missing_programs():
        parser.error(f"no {', '.join(missing)} here: apt-get install --no-install-recommends {' '.join(PACKAGES)}")
    with running_cluster(args.nodes) as cluster:
        return subprocess.run(args.command or ["sinfo"], env=cluster.env).returncode


if __name__ == "__main__":
    sys.exit(main())
