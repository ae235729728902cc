"""A Slurm cluster of two nodes on this machine, for as long as the tests of this folder run.

Its munged, slurmctld and two slurmd have files, ports and a key of their own below a temporary
folder; a Slurm that this machine may run already is not touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=30
InactiveLimit=0
KillWait=30
MinJobAge=3600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=8 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=8 RealMemory=2000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=1:00:00 State=UP PriorityTier=1
PartitionName=urgent Nodes=n1,n2 MaxTime=1:00:00 State=UP PriorityTier=9
"""


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.slurm)


def lacking() -> str:
    """Why no cluster can be started here; empty if one can."""
    missing = [p for p in PROGRAMS if shutil.which(p, path=PATH) is None]
    if missing:
        return f"no Slurm here ({', '.join(missing)}): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "starting a Slurm cluster takes root"


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


class Cluster:
    """Daemons, and the commands that a user has."""

    def __init__(self, folder: Path):
        self.folder = folder
        ctld, n1, n2 = free_ports(3)
        host = socket.gethostname().split(".")[0]
        conf = folder / "slurm.conf"
        conf.write_text(CONF.format(host=host, folder=folder, ctld=ctld, n1=n1, n2=n2))
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM")},
            "PATH": PATH,
            "SLURM_CONF": str(conf),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
            "DOCTOR": "off",
        }
        self.daemons: dict[str, subprocess.Popen] = {}
        self.jobs: list[str] = []
        self.hurried: set[str] = set()

    def start(self) -> None:
        munge = [f"--{k}={self.folder / 'munge'}.{v}" for k, v in
                 {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log",
                  "seed-file": "seed"}.items()]  # fmt: skip
        self._daemon("munged", "munged", "--foreground", "--force", *munge)
        self._until(lambda: (self.folder / "munge.sock").exists(), "munged")
        self._daemon("slurmctld", "slurmctld", "-D", "-i")
        for node in ("n1", "n2"):
            self.node(node)
        self._until(lambda: self.run("sinfo", "-hNo", "%T", check=False).split() == ["idle"] * 4,
                    "the nodes", 60)  # fmt: skip

    def node(self, name: str) -> None:
        """Start the daemon of that node."""
        self._daemon(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str, task: int) -> None:
        """As if its power had gone: the daemon, and a task's process with all that Slurm runs
        above it on that node."""
        self.daemons[name].kill()
        self.daemons[name].wait()
        above = [task]
        while (parent := _parent(above[-1])) > 1 and "slurm" in _name(parent):
            above.append(parent)
        for pid in reversed(above):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _daemon(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                env=self.env, stdout=out, stderr=out, cwd=self.folder, start_new_session=True,
            )  # fmt: skip

    def _until(self, holds, what: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                told = "\n".join(p.read_text(errors="replace")[-800:]
                                 for p in sorted(self.folder.glob("*.log")))  # fmt: skip
                pytest.fail(f"{what} did not come up:\n{told}")
            time.sleep(0.1)

    def run(self, *command: str, check: bool = True, **env: str) -> str:
        done = subprocess.run(
            command, env={**self.env, **env}, capture_output=True, text=True, cwd=ROOT, timeout=60
        )
        if check and done.returncode:
            pytest.fail(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout

    # -- jobs ------------------------------------------------------------------------------------

    def sbatch(self, *arguments: str, **env: str) -> str:
        """Submit; returns the job's id."""
        told = self.run("sbatch", "--parsable", *arguments, **env)
        self.jobs.append(told.strip().split(";")[0])
        return self.jobs[-1]

    def show(self, job: str, key: str) -> str:
        """A field of ``scontrol show job``; of the first record."""
        told = self.run("scontrol", "show", "job", job, check=False)
        found = re.search(rf"\b{key}=(\S+)", told)
        return found.group(1) if found else ""

    def hurry(self, job: str) -> None:
        """Slurm lets a requeued job wait for two minutes: three seconds are enough here.

        (At once would be too soon: the old start's credential is revoked to the second.)
        """
        if job not in self.hurried and self.show(job, "Reason") == "BeginTime":
            self.hurried.add(job)
            for part in (job, f"{job}+1"):  # the second: of a heterogeneous job
                self.run("scontrol", "update", f"jobid={part}", "StartTime=now+3", check=False)
        elif self.show(job, "JobState") == "RUNNING":
            self.hurried.discard(job)

    def wait(self, job: str, seconds: float = 300, until=lambda: False) -> str:
        """The state of a job that may be requeued on its way: its last one, or when ``until``.

        ``seconds`` is no measure of speed, only the end of hope.
        """
        end = time.monotonic() + seconds
        while (state := self.show(job, "JobState")) not in (
            "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY",
        ) and not until():  # fmt: skip
            if time.monotonic() > end:
                pytest.fail(f"job {job} is still {state}\n{self.run('squeue')}")
            self.hurry(job)
            time.sleep(0.2)
        return state

    def until_gone(self, job: str, seconds: float = 120) -> None:
        """Wait until Slurm has ended all processes of a job, which its state may precede."""
        end = time.monotonic() + seconds
        while self.run("squeue", "-h", "-j", job, "-o", "%T", check=False).strip():
            if time.monotonic() > end:
                pytest.fail(f"job {job} does not end\n{self.run('squeue')}")
            time.sleep(0.2)

    def mark(self, node: str, state: str) -> None:
        """Tell the controller that a node is ``down``, or may ``resume``."""
        self.run("scontrol", "update", f"nodename={node}", f"state={state}", "reason=drill")

    def stop(self) -> None:
        for job in self.jobs:
            self.run("scancel", "--signal=KILL", "--full", job, check=False)
            self.run("scancel", job, check=False)
        time.sleep(1)
        for daemon in reversed(list(self.daemons.values())):
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@pytest.fixture(scope="session")
def cluster():
    """Two nodes, n1 and n2, of eight CPUs each."""
    if reason := lacking():
        pytest.skip(reason)
    # munged wants a short path for its socket, and a folder that nobody else may write.
    folder = Path(tempfile.mkdtemp(prefix="dsasr-slurm-", dir="/tmp"))
    folder.chmod(0o755)
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)
