"""A real Slurm on this one machine, from Debian's packages, that pretends to be a node of 8 GPUs, 64 cores and 1 TB of memory.

Its files lie in one folder, its daemons are children of this process and are stopped by their process ids. A Slurm that is there
already is never touched: `refusal` says in one line why this one cannot be started.
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
# Slurm's clients look here: the executor plugin takes SLURM_CONF from the environment of what it starts in a job.
BUILT_IN = Path("/etc/slurm")
MARK = "sppo-slurm-"  # in the name of the folder, by which links in BUILT_IN are known to be ours
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
    """Why Slurm cannot be started here, or None."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "a test Slurm needs root and apt-get: run make test-slurm in a container of Debian or Ubuntu"
    for name in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if name.read_text().strip() in DAEMONS:
                return f"{name.read_text().strip()} runs here already (process {name.parent.name}): a Slurm that is there is not touched"
    conf = BUILT_IN / "slurm.conf"
    if "SLURM_CONF" in os.environ or (conf.exists() and not _ours(conf)):
        return f"Slurm is configured here already ({os.environ.get('SLURM_CONF', conf)}): a Slurm that is there is not touched"
    return None


def _ours(link: Path) -> bool:
    return link.is_symlink() and MARK in os.readlink(link)


def install() -> None:
    """Debian's packages, where they are missing; their services are not started."""
    if all(shutil.which(name) for name in (*DAEMONS, "munged", "mariadbd")):
        return
    quiet = os.environ | {
        "DEBIAN_FRONTEND": "noninteractive",
        "RUNLEVEL": "1",
    }  # invoke-rc.d starts nothing in runlevel 1
    for words in (
        ["update", "-qq"],
        ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES],
    ):
        subprocess.run(
            ["apt-get", *words], check=True, env=quiet, stdout=subprocess.DEVNULL, timeout=600
        )


def slurm(*words: str) -> str:
    """What a command of Slurm's prints; an error of its is one of ours."""
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


@contextlib.contextmanager
def running(folder: Path, accounting: bool) -> Iterator[None]:
    """Slurm, up and idle; with accounting it has the account `physics` and its database."""
    folder.chmod(0o755)
    for name in ("state", "spool", "mysql"):
        (folder / name).mkdir()
    _configure(folder, accounting)
    links = [BUILT_IN / name for name in ("slurm.conf", "gres.conf")]
    BUILT_IN.mkdir(exist_ok=True)
    daemons: list[subprocess.Popen] = []
    try:
        for link in links:
            link.unlink(missing_ok=True)  # of a test that was killed
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
            _until(
                lambda: (
                    "sppo" in slurm("sacctmgr", "-n", "-P", "show", "cluster", "format=cluster")
                ),
                daemons,
                folder,
                "slurmctld's database",
            )
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
        _end_what_is_left(folder)
        for link in links:
            if _ours(link):
                link.unlink()


def _end_what_is_left(folder: Path) -> None:
    """Kill what jobs of this Slurm have left behind: without control groups it loses sight of a cancelled job that does not end by itself."""
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if mark in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)


def _configure(folder: Path, accounting: bool) -> None:
    """slurm.conf, gres.conf, slurmdbd.conf, a key, and eight names of /dev/null as GPUs: Slurm wants character devices and takes the number
    at the end of the name for the GPU's."""
    template = Path(__file__).with_name("slurm.conf").read_text(encoding="utf-8")
    kept = WITH_ACCOUNTING.format(folder=folder) if accounting else WITHOUT_ACCOUNTING
    (folder / "slurm.conf").write_text(
        template.format(folder=folder, host=socket.gethostname().split(".")[0], accounting=kept)
    )
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
    """Start a daemon that ends with this process, also where that one is killed."""
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
    """MariaDB, open to this machine alone, and slurmdbd before it."""
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
    """Wait until something holds, a minute at most; a daemon that ended, or the minute, is an error with the last lines of all logs."""
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
            raise RuntimeError(f"Slurm for the tests: waited in vain for {what}\n{tails}")
        time.sleep(0.2)
