"""Make Snakemake targets without starting Python once for each job.

    .venv/bin/python src/tools/run_forked.py --configfile mine.yaml -- results/summary.md

Reads   the shell commands that `snakemake --dry-run` prints for the targets
Writes  the same artifacts, records and logs as Snakemake, but no benchmarks

Every job of a small run spends seconds importing torch and transformers. This program imports them
once and forks a process for each job, one after the other. All arguments are Snakemake's. It makes
no conda environments, uses no cluster, runs no jobs in parallel, and deletes no policies
(`keep_policies`).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import _path  # noqa: F401
from sppo.core.errors import UserError, run

COMMAND = re.compile(r"^Shell command: (?P<command>.*?) 2>&1 \| tee (?P<log>\S+)$", re.MULTILINE)


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        argparse.ArgumentParser(
            usage="run_forked.py [arguments of snakemake]",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ).parse_args(["--help"])
    if not hasattr(os, "fork"):
        raise UserError("this system cannot fork processes; use snakemake")
    jobs = commands(sys.argv[1:])
    if not jobs:
        print("nothing to be done")
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    # Only imports: a process must not fork after torch has started threads.
    import alpaca_eval  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401

    for number, (arguments, log) in enumerate(jobs, start=1):
        begun = time.monotonic()
        forked(arguments, log)
        seconds = time.monotonic() - begun
        print(f"{number} of {len(jobs)}: {log.removesuffix('.log')}, {seconds:.1f} s", flush=True)


def commands(arguments: list[str]) -> list[tuple[list[str], str]]:
    """The arguments and the log of every job that Snakemake would run, in an order that works.

    UserError if Snakemake refuses, or a job is not one Python program.
    """
    asked = [str(Path(sys.executable).parent / "snakemake"), "--cores", "all"]
    asked += ["--dry-run", "--printshellcmds", *arguments]
    shown = subprocess.run(asked, capture_output=True, text=True)
    text = shown.stdout + shown.stderr
    if shown.returncode:
        raise UserError(refusal(text))
    found = []
    for match in COMMAND.finditer(text):
        words = shlex.split(match["command"])
        is_python = Path(words[0]).name.startswith("python")
        if not is_python or len(words) < 2 or not words[1].endswith(".py"):
            raise UserError(f"this job is no Python program, so use snakemake: {match['command']}")
        found.append((words[1:], match["log"]))
    if len(found) != text.count("\nShell command: "):
        raise UserError("a job's command has another form than `program 2>&1 | tee log`")
    return found


def refusal(text: str) -> str:
    """What Snakemake's output gives as the reason for its refusal."""
    lines = text.strip().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("error: "):  # this repository's own checks
            return line.removeprefix("error: ")
        if re.match(r"\w+(Exception|Error)\b", line):
            return "snakemake: " + " ".join(lines[number : number + 2])
    return f"snakemake refuses: {text.strip()}"


def forked(arguments: list[str], log: str) -> None:
    """Run a program in a forked process, with its output in the log. UserError if it fails."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    # A kill ends the job that runs too. Otherwise it would go on alone.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 1
        try:
            sys.argv = list(arguments)
            program = Path(arguments[0])
            sys.path.insert(0, str(program.parent))
            sys.modules.pop("_path", None)  # each folder of programs has its own
            spec = importlib.util.spec_from_file_location("__main__", program)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules["__main__"] = module
            spec.loader.exec_module(module)
            status = 0
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else int(bool(stopped.code))
            if isinstance(stopped.code, str):
                print(stopped.code, file=sys.stderr)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    try:
        _, status = os.waitpid(child, 0)
    except BaseException:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    if status:
        lines = Path(log).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no output"
        raise UserError(f"{arguments[0]} failed; see {log}. Its last line: {last}")


if __name__ == "__main__":
    run(main)
