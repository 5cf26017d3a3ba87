"""A stand-in for the `conda` command, for machines that reach PyPI but no conda channel.

It answers the calls that Snakemake makes. `env create` solves and links with py-rattler, pixi's
library, from <root>/channels/<channel>/. <root> is the folder above the folder of this file. The
`pip:` section is installed with the pip of the new environment. CONDA_VERSION sets the version that
the stand-in reports.
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
    """Answer one call; returns the exit status."""
    if words == ["--version"]:
        print(f"conda {VERSION}")
    elif words[:1] == ["info"]:
        info = {"conda_prefix": str(ROOT), "platform": "linux-64", "conda_version": VERSION}
        print(json.dumps(info))
    elif words[:2] == ["config", "--get"]:
        print(json.dumps({"get": {"channel_priority": "strict"}}))
    elif words[:1] == ["clean"]:
        pass  # the only cache is small and is deleted together with the stand-in
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
        print(f"the stand-in does not support: conda {' '.join(words)}", file=sys.stderr)
        return 2
    return 0


def create(file: Path, prefix: Path) -> None:
    """Create the environment of a YAML file in the folder `prefix`."""
    import yaml

    environment = yaml.safe_load(file.read_text(encoding="utf-8"))
    packages = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    from_pip: list[str] = []
    for entry in environment["dependencies"]:
        if isinstance(entry, dict):
            from_pip += entry["pip"]
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
    """Solve for conda packages and install them into the folder `prefix`."""
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
    os._exit(status)  # a normal exit can fail, because rattler's threads are still running
