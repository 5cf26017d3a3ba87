"""Whether a Slurm cluster can take the jobs at all, asked before the first is submitted. Imports nothing heavy.

Slurm itself tells of most of this only job by job, or lets a job wait for ever.
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
    """What the jobs of one rule ask of the cluster; `minutes` of the last attempt; no partition or account is "".

    gpus: those of the whole job, over all its nodes; gpus_needed: those that the configuration makes it use.
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
    """Partitions and account are the cluster's, no job asks for more time than its partition gives or for more GPUs than Snakemake hands
    out, and Snakemake learns in a way that works here when a job ends. Raises `UserError` naming the first that is not so."""
    limits = _partitions()
    accounts = _accounts()
    if accounts is None and status_command != "squeue":
        raise UserError(
            f"this cluster keeps no accounts, and Snakemake would never see a job end; in {PROFILE} take the # from "
            "slurm-status-command: squeue"
        )
    too_long: dict[str, list[Asked]] = {}
    for job in asked:
        if accounts is None and job.account:
            raise UserError(
                f"slurm_account is {job.account}, but this cluster keeps no accounts; delete the line from {PROFILE}"
            )
        if accounts and job.account and job.account.lower() not in accounts:
            raise UserError(
                f"slurm_account is {job.account}, but {getpass.getuser()} may use {', '.join(sorted(accounts))}; edit {PROFILE}"
            )
        if job.gpus < job.gpus_needed:
            raise UserError(
                f"{job.rule} needs {job.gpus_needed} GPUs (responses.tensor_parallel, train.processes), and {PROFILE} gives it {job.gpus}; "
                "edit gpu there"
            )
        if most_gpus is not None and job.gpus > most_gpus:
            raise UserError(
                f"{job.rule} asks for {job.gpus} GPUs, but no more than {most_gpus} may be in use at a time; give --workflow-profile "
                "profiles/slurm, for --profile leaves profiles/default in force, or a larger --resources gpu"
            )
        if not job.partition and not any(name.endswith("*") for name in limits):
            raise UserError(
                f"no slurm_partition is given, and this cluster has no default one but {_listed(limits)}; edit {PROFILE}"
            )
        for partition in filter(None, job.partition.split(",")):
            limit = _limit(limits, partition)
            if limit is None:
                raise UserError(
                    f"slurm_partition is {partition}, but this cluster has {_listed(limits)}; edit {PROFILE}"
                )
            if job.minutes and job.minutes > limit:
                too_long.setdefault(partition, []).append(job)
    for partition, jobs in too_long.items():
        longest, limit = max(jobs, key=lambda job: job.minutes or 0), _limit(limits, partition)
        raise UserError(
            f"jobs of {len(jobs)} rules may ask for more than the {limit:.0f} minutes that partition {partition} gives, {longest.rule} for "
            f'{longest.minutes}, and would wait for ever; lower runtime in {PROFILE}, as in "min(60 * attempt, {limit:.0f})"'
        )


def _limit(limits: dict[str, float], partition: str) -> float | None:
    """The partition's longest run time; None if the cluster has no such partition."""
    return limits.get(partition, limits.get(f"{partition}*"))


def _listed(limits: dict[str, float]) -> str:
    return ", ".join(sorted(name.removesuffix("*") for name in limits))


def _partitions() -> dict[str, float]:
    """Longest run time in minutes by partition; the default partition's name ends in *."""
    try:
        lines = _told("sinfo", "--all", "--noheader", "--format=%P|%l").splitlines()
    except FileNotFoundError:
        raise UserError(
            "there is no Slurm here (no command sinfo); run on the cluster's login node, or without --workflow-profile "
            "profiles/slurm"
        ) from None
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"Slurm does not answer ({error.stderr.strip()}); try again when sinfo works"
        ) from None
    return {name: _minutes(limit) for name, limit in (line.rsplit("|", 1) for line in lines)}


def _minutes(limit: str) -> float:
    """Minutes of Slurm's [days-][hours:]minutes:seconds."""
    if limit == "infinite":
        return float("inf")
    days, _, clock = limit.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part)
    return int(days or 0) * 24 * 60 + seconds / 60


def _accounts() -> set[str] | None:
    """Accounts of this user, an empty set where Slurm does not tell, None on a cluster that keeps none."""
    try:
        _told("sacct", "--noheader", "--allocations")
        return {
            name
            for name in _told(
                "sacctmgr",
                "--noheader",
                "--parsable2",
                "show",
                "associations",
                f"user={getpass.getuser()}",
                "format=account",
            )
            .lower()
            .split()
            if name
        }
    except FileNotFoundError:
        return None
    except subprocess.CalledProcessError as error:
        return None if "disabled" in error.stderr else set()


def _told(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout
