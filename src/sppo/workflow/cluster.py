"""Check, before the first job is submitted, that a Slurm cluster can run the jobs at all.

Slurm itself reports most of these faults only when a job is submitted, or lets a job wait without
end. The Snakefile imports this module, so it imports nothing that is slow to load.
"""

from __future__ import annotations

import getpass
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from sppo.core.errors import UserError

PROFILE = "profiles/slurm/config.yaml"


@dataclass(frozen=True)
class Asked:
    """What the jobs of one rule request from the cluster.

    `partition` and `account` are "" if none is set. `minutes` is the run time of the last attempt,
    None if none is set. `gpus` are the GPUs of the whole job, over all its nodes; `gpus_needed` are
    the GPUs that the configuration makes the job use.
    """

    rule: str
    partition: str
    account: str
    minutes: int | None
    gpus: int = 0
    gpus_needed: int = 0


def check_cluster(
    asked: Iterable[Asked], status_command: str | None, most_gpus: int | None = None
) -> None:
    """Check what the rules request, and how Snakemake learns that a job has ended.

    Args:
        asked: what the jobs of each rule request.
        status_command: the profile's slurm-status-command, None if it is not set.
        most_gpus: the most GPUs that Snakemake lets its jobs use at a time, None for no limit.

    Raises:
        UserError: naming the first fault. Either a partition or an account does not exist, or a job
            requests more time than its partition allows, or fewer GPUs than it needs, or more than
            `most_gpus`, or Snakemake would not notice on this cluster that a job has ended.
    """
    limits = _partitions()
    accounts = _accounts()
    if accounts is None and status_command != "squeue":
        raise UserError(
            "this cluster does not keep accounts, so Snakemake would never see that a job has "
            f"ended; in {PROFILE} remove the # before slurm-status-command: squeue"
        )
    too_long: dict[str, list[Asked]] = {}
    for job in asked:
        _check_account(job, accounts)
        _check_gpus(job, most_gpus)
        if not job.partition and not any(name.endswith("*") for name in limits):
            raise UserError(
                "slurm_partition is not set, and this cluster has no default partition; in "
                f"{PROFILE} set it to one of {_listed(limits)}"
            )
        for partition in filter(None, job.partition.split(",")):
            limit = _limit(limits, partition)
            if limit is None:
                raise UserError(
                    f"slurm_partition is {partition}, but this cluster has {_listed(limits)}; "
                    f"edit {PROFILE}"
                )
            if job.minutes and job.minutes > limit:
                too_long.setdefault(partition, []).append(job)
    for partition, jobs in too_long.items():
        longest = max(jobs, key=lambda job: job.minutes or 0)
        limit = _limit(limits, partition)
        raise UserError(
            f"jobs of {len(jobs)} rules may ask for more than the {limit:.0f} minutes that "
            f"partition {partition} allows ({longest.rule} for {longest.minutes}), and would wait "
            f'without end; lower runtime in {PROFILE}, as in "min(60 * attempt, {limit:.0f})"'
        )


def _check_account(job: Asked, accounts: set[str] | None) -> None:
    """Raise a UserError if the job's account is not one of `accounts`, see `_accounts`."""
    if accounts is None and job.account:
        raise UserError(
            f"slurm_account is {job.account}, but this cluster does not keep accounts; "
            f"delete the line from {PROFILE}"
        )
    if accounts and job.account and job.account.lower() not in accounts:
        raise UserError(
            f"slurm_account is {job.account}, but {getpass.getuser()} may use "
            f"{', '.join(sorted(accounts))}; edit {PROFILE}"
        )


def _check_gpus(job: Asked, most_gpus: int | None) -> None:
    """Raise a UserError if a job requests fewer GPUs than it needs or more than `most_gpus`."""
    if job.gpus < job.gpus_needed:
        raise UserError(
            f"{job.rule} needs {job.gpus_needed} GPUs (responses.tensor_parallel, train.processes),"
            f" but {PROFILE} gives it {job.gpus}; edit gpu there"
        )
    if most_gpus is not None and job.gpus > most_gpus:
        raise UserError(
            f"{job.rule} asks for {job.gpus} GPUs, but at most {most_gpus} may be in use at a time;"
            " give --workflow-profile profiles/slurm instead of --profile, which keeps the limits"
            " of profiles/default, or a larger --resources gpu"
        )


def _limit(limits: dict[str, float], partition: str) -> float | None:
    """The partition's longest run time in minutes; None if the cluster has no such partition."""
    return limits.get(partition, limits.get(f"{partition}*"))


def _listed(limits: dict[str, float]) -> str:
    """The names of the partitions, without the mark of the default partition."""
    return ", ".join(sorted(name.removesuffix("*") for name in limits))


def _partitions() -> dict[str, float]:
    """Each partition's longest run time in minutes. The default partition's name ends in *."""
    try:
        lines = _output("sinfo", "--all", "--noheader", "--format=%P|%l").splitlines()
    except FileNotFoundError:
        raise UserError(
            "Slurm is not installed here (no command sinfo); run on the cluster's login node, or "
            "without --workflow-profile profiles/slurm"
        ) from None
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"Slurm does not answer ({error.stderr.strip()}); try again when sinfo works"
        ) from None
    limits = {}
    for line in lines:
        name, limit = line.rsplit("|", 1)
        limits[name] = _minutes(limit)
    return limits


def _minutes(limit: str) -> float:
    """Convert a time limit of Slurm, [days-][hours:]minutes:seconds or infinite, to minutes."""
    if limit == "infinite":
        return float("inf")
    days, _, clock = limit.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part)
    return int(days or 0) * 24 * 60 + seconds / 60


def _accounts() -> set[str] | None:
    """The accounts of this user in lower case.

    An empty set if Slurm does not tell; None if the cluster does not keep accounts.
    """
    try:
        _output("sacct", "--noheader", "--allocations")  # Fails if accounting is disabled.
        listed = _output(
            "sacctmgr",
            "--noheader",
            "--parsable2",
            "show",
            "associations",
            f"user={getpass.getuser()}",
            "format=account",
        )
    except FileNotFoundError:
        return None
    except subprocess.CalledProcessError as error:
        return None if "disabled" in error.stderr else set()
    return set(listed.lower().split())


def _output(*words: str) -> str:
    """Run a command and return what it prints."""
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout
