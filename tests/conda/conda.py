"""A stand-in for the `conda` command, where a Python registry can be reached and no conda channel.

Answers the calls that Snakemake makes. `env create` solves and links with py-rattler (the library under pixi)
from <root>/channels/<channel>/, <root> being the folder above this file's, and installs the `pip:` section with
the new environment's own pip. CONDA_VERSION is the version that it claims.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = os.environ.get("CONDA_VERSION", "26.7.1")


def main(words: list[str]) -> int:
    """Carry out one call; returns the exit status."""
    if words == ["--version"]:
        print(f"conda {VERSION}")
    elif words[:1] == ["info"]:
        print(
            json.dumps(
                {"conda_prefix": str(ROOT), "platform": "linux-64", "conda_version": VERSION}
            )
        )
    elif words[:2] == ["config", "--get"]:
        print(json.dumps({"get": {"channel_priority": "strict"}}))
    elif words[:1] == ["clean"]:
        pass  # packages are linked from one small cache, which goes with the stand-in
    elif words[:2] == ["env", "create"]:
        parser = argparse.ArgumentParser(prog="conda env create")
        parser.add_argument("--quiet", action="store_true")
        parser.add_argument("--no-default-packages", action="store_true")
        parser.add_argument("--file", type=Path, required=True)
        parser.add_argument("--prefix", type=Path, required=True)
        args = parser.parse_args(words[2:])
        try:
            create(args.file, args.prefix)
        except BaseException:
            shutil.rmtree(args.prefix, ignore_errors=True)
            raise
    else:
        print(f"the stand-in has no: conda {' '.join(words)}", file=sys.stderr)
        return 2
    return 0


def create(file: Path, prefix: Path) -> None:
    """Make the environment that a YAML file describes."""
    import yaml

    environment = yaml.safe_load(file.read_text(encoding="utf-8"))
    packages = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    from_pip = [
        word
        for entry in environment["dependencies"]
        if isinstance(entry, dict)
        for word in entry["pip"]
    ]
    asyncio.run(link(prefix, environment["channels"], packages))
    if from_pip:
        requirements = prefix / "conda-meta" / "pip-requirements.txt"
        requirements.write_text("\n".join(from_pip) + "\n", encoding="utf-8")
        subprocess.run(
            [prefix / "bin/python", "-m", "pip", "install", "--quiet", "-r", requirements],
            check=True,
            stdin=subprocess.DEVNULL,
        )


async def link(prefix: Path, channels: list[str], packages: list[str]) -> None:
    """Solve for conda packages and put them into the new environment."""
    import rattler

    solved = await rattler.solve(
        [(ROOT / "channels" / name).as_uri() for name in channels],
        packages,
        platforms=["linux-64", "noarch"],
        virtual_packages=rattler.VirtualPackage.detect(),
    )
    await rattler.install(
        solved, target_prefix=prefix, show_progress=False, cache_dir=ROOT / "packages"
    )


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # rattler's threads can abort an interpreter that finalises
