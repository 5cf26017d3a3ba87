"""A real Slurm on this machine, from Debian's packages, with a node of 8 fake GPUs.

The node also pretends to have 64 cores and 1 TB of memory. All files are in one folder. The daemons
are children of this process and are stopped by their process ids. An existing Slurm is never
touched: `refusal` gives the reason if this Slurm cannot be started.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge", "slurmdbd", "mariadb-server-core")
DAEMONS = ("slurmctld", "slurmd", "slurmdbd")
# Slurm's clients read their configuration here. SLURM_CONF is no alternative, because the executor
# plugin removes it from the environment of the programs that it starts in a job.
BUILT_IN = Path("/etc/slurm")
MARK = "sppo-slurm-"  # part of the folder's name; links in BUILT_IN to such a folder are ours
ACCOUNT = "physics"
WITHOUT_ACCOUNTING = "AccountingStorageType=accounting_storage/none"
WITH_ACCOUNTING = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=16819
AccountingStoragePass={folder}/munge.socket
AccountingStorageEnforce=associations"""
DATABASE_CONF = """AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=16806
StorageUser=root
StorageLoc=slurm
"""


def refusal() -> str | None:
    """The reason why Slurm cannot be started here; None if it can."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return (
            "a test Slurm needs root and apt-get; "
            "run make test-slurm in a container of Debian or Ubuntu"
        )
    for file in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            name = file.read_text().strip()
            if name in DAEMONS:
                return (
                    f"{name} runs here already (process {file.parent.name}); "
                    "run make test-slurm on a machine without Slurm"
                )
    conf = BUILT_IN / "slurm.conf"
    if "SLURM_CONF" in os.environ or (conf.exists() and not _ours(conf)):
        return (
            f"Slurm is configured here already ({os.environ.get('SLURM_CONF', conf)}); "
            "run make test-slurm on a machine without Slurm"
        )
    return None


def _ours(link: Path) -> bool:
    return link.is_symlink() and MARK in os.readlink(link)


def install() -> None:
    """Install the missing packages of Debian without starting their services."""
    if all(shutil.which(name) for name in (*DAEMONS, "munged", "mariadbd")):
        return
    # In runlevel 1 invoke-rc.d starts no services.
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for words in (
        ["update", "-qq"],
        ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES],
    ):
        subprocess.run(
            ["apt-get", *words], check=True, env=quiet, stdout=subprocess.DEVNULL, timeout=600
        )


def slurm(*words: str) -> str:
    """The output of a Slurm command; a failed command raises CalledProcessError."""
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


@contextlib.contextmanager
def running(folder: Path, accounting: bool) -> Iterator[None]:
    """A running and idle Slurm; with accounting it has a database and the account `physics`."""
    folder.chmod(0o755)
    for name in ("state", "spool", "mysql"):
        (folder / name).mkdir()
    _configure(folder, accounting)
    links = [BUILT_IN / name for name in ("slurm.conf", "gres.conf")]
    BUILT_IN.mkdir(exist_ok=True)
    daemons: list[subprocess.Popen] = []
    try:
        for link in links:
            link.unlink(missing_ok=True)  # a killed test leaves its link behind
            link.symlink_to(folder / link.name)
        _start(
            daemons,
            folder,
            "munged",
            "--foreground",
            "--force",
            f"--key-file={folder}/munge.key",
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munge.pid",
            f"--log-file={folder}/munge.log",
            f"--seed-file={folder}/munge.seed",
        )
        _until(lambda: (folder / "munge.socket").exists(), daemons, folder, "munged")
        if accounting:
            _start_database(daemons, folder)
        _start(daemons, folder, "slurmctld", "-D", "-c")
        if accounting:
            _until(_cluster_is_known, daemons, folder, "slurmctld's database")
            slurm("sacctmgr", "-i", "add", "account", ACCOUNT, "cluster=sppo")
            slurm("sacctmgr", "-i", "add", "user", "root", f"account={ACCOUNT}", "cluster=sppo")
        _start(daemons, folder, "slurmd", "-D", "-c")
        _until(
            lambda: slurm("sinfo", "-h", "-p", "gpu", "-o", "%t").strip() == "idle",
            daemons,
            folder,
            "the node",
        )
        yield
    finally:
        with contextlib.suppress(OSError, RuntimeError, subprocess.SubprocessError):
            slurm("scancel", "--user=root")
            _until(lambda: not slurm("squeue", "-h"), daemons, folder, "end of the jobs")
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        _kill_remaining_processes(folder)
        for link in links:
            if _ours(link):
                link.unlink()


def _cluster_is_known() -> bool:
    return "sppo" in slurm("sacctmgr", "-n", "-P", "show", "cluster", "format=cluster")


def _kill_remaining_processes(folder: Path) -> None:
    """Kill the processes that jobs of this Slurm have left behind.

    Without control groups Slurm loses track of a cancelled job that does not end by itself.
    """
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or it belongs to another user
            if mark in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)


def _configure(folder: Path, accounting: bool) -> None:
    """Write slurm.conf, gres.conf, slurmdbd.conf and a key, and make eight fake GPUs.

    The GPUs are links to /dev/null, because Slurm requires character devices. The number at the end
    of the name is the number of the GPU.
    """
    template = Path(__file__).with_name("slurm.conf").read_text(encoding="utf-8")
    lines = WITH_ACCOUNTING.format(folder=folder) if accounting else WITHOUT_ACCOUNTING
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(template.format(folder=folder, host=host, accounting=lines))
    (folder / "gres.conf").write_text(f"Name=gpu Type=fake File={folder}/nvidia[0-7]\n")
    for number in range(8):
        (folder / f"nvidia{number}").symlink_to("/dev/null")
    for name, content in (
        ("munge.key", os.urandom(1024)),
        ("slurmdbd.conf", DATABASE_CONF.format(folder=folder).encode()),
    ):
        (folder / name).touch(mode=0o600)
        (folder / name).write_bytes(content)


def _start(daemons: list[subprocess.Popen], folder: Path, *words: str) -> None:
    """Start a daemon that ends with this process, also if this process is killed."""
    with (folder / f"{words[0]}.out").open("wb") as output:
        daemons.append(
            subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *words],
                env=os.environ | {"SLURM_CONF": str(folder / "slurm.conf")},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        )


def _start_database(daemons: list[subprocess.Popen], folder: Path) -> None:
    """Start MariaDB, which listens only on this machine, and slurmdbd, which uses it."""
    _start(
        daemons,
        folder,
        "mariadbd",
        "--no-defaults",
        "--skip-grant-tables",
        f"--datadir={folder}/mysql",
        f"--socket={folder}/mysql.socket",
        "--user=root",
        "--bind-address=127.0.0.1",
        "--port=16806",
        f"--pid-file={folder}/mysql.pid",
    )
    _until(lambda: _listening(16806), daemons, folder, "mariadbd")
    _start(daemons, folder, "slurmdbd", "-D")
    _until(lambda: _listening(16819), daemons, folder, "slurmdbd")


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _until(
    holds: Callable[[], bool], daemons: list[subprocess.Popen], folder: Path, what: str
) -> None:
    """Wait until `holds` is true.

    The error after a minute, or after the end of a daemon, shows the last lines of all logs.
    """
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(subprocess.SubprocessError):
            if holds():
                return
        if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in daemons):
            tails = "\n".join(
                f"{log.name}: {log.read_text(errors='replace')[-1000:]}"
                for log in (*folder.glob("*.out"), *folder.glob("*.log"))
            )
            raise RuntimeError(f"Slurm for the tests: the wait for {what} failed\n{tails}")
        time.sleep(0.2)
