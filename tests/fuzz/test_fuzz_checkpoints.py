"""Damage of any kind to what a killed training left: the weights are those of an undisturbed one, or one line.

FUZZ=5 runs five seeds of random damage in place of one.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.test_training import (  # noqa: F401, killed is a fixture
    RESUMABLE,
    Place,
    distance,
    killed,
    steps_said,
)

from sppo.core.errors import UserError

FUZZ = int(os.environ.get("FUZZ", "1"))
RANDOM = 20
pytestmark = pytest.mark.slow


def flip(draw: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut(draw: random.Random, file: Path) -> None:
    os.truncate(file, draw.randrange(max(file.stat().st_size, 1)))


def lengthen(draw: random.Random, file: Path) -> None:
    file.write_bytes(file.read_bytes() + bytes(draw.randrange(1, 5000)))


def to_folder(draw: random.Random, file: Path) -> None:
    file.unlink()
    file.mkdir()
    if draw.random() < 0.5:
        (file / "in it").write_text("x")


def to_dead_link(draw: random.Random, file: Path) -> None:
    file.unlink()
    file.symlink_to(draw.choice(["nowhere", file.name]))


def replace(draw: random.Random, file: Path) -> None:
    file.write_bytes(
        draw.choice(
            [
                b"{}",
                b"[]",
                b"null",
                b"0",
                b'"x"',
                b"\xff\xfe",
                b'{"a": 1}',
                b'{"model.safetensors": 3}',
                b"[" * 5000,
            ]
        )
    )


DAMAGES: dict[str, Callable[[random.Random, Path], None]] = {
    "removed": lambda draw, file: file.unlink(),
    "emptied": lambda draw, file: file.write_bytes(b"") and None,
    "cut": cut,
    "a bit flipped": flip,
    "longer": lengthen,
    "a folder": to_folder,
    "a dead link": to_dead_link,
    "other content": replace,
    "unreadable": lambda draw, file: file.chmod(0),
}


def work_of(place: Place) -> Path:
    """The work folder as the kill left it, and no policy."""
    work = place.folder / ".policy.work"
    for folder in (work, place.folder / "policy"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.unlink(missing_ok=True)
    for file in (place.folder / "policy.jsonl", *place.folder.glob("policy*.record.json")):
        file.unlink(missing_ok=True)
    return Path(shutil.copytree(place.folder / "kept", work, symlinks=True))


def resumed(killed, capsys) -> list[str]:
    """The steps that were trained again; the weights are checked."""
    place, whole = killed
    capsys.readouterr()
    try:
        weights = place.train("policy", **RESUMABLE)
    except UserError as error:
        assert "\n" not in str(error) and str(place.folder) in str(error)
        assert not (place.folder / "policy").exists() and not list(place.folder.glob("*.tmp"))
        return [f"refused: {error}"]
    assert distance(whole, weights) < 1e-7
    assert not [path for path in place.folder.iterdir() if path.name.startswith(".")]
    return steps_said(capsys)


def files_of(work: Path) -> list[Path]:
    return sorted(file.relative_to(work) for file in work.rglob("*") if file.is_file())


def test_every_file_of_the_newest_checkpoint_in_turn(killed, capsys):
    draw = random.Random(0)
    place, _ = killed
    names = [name for name in files_of(work_of(place)) if name.parts[0] == "checkpoint-3"]
    for name in names:
        how = draw.choice(list(DAMAGES))
        DAMAGES[how](draw, work_of(place) / name)
        expected = ["4", "5"] if how == "unreadable" and os.geteuid() == 0 else ["3", "4", "5"]
        assert resumed(killed, capsys) == expected, (name, how)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["made_for.json", "checkpoint-3/manifest.json"])
def test_label_and_manifest_in_every_way(name, how, killed, capsys):
    DAMAGES[how](random.Random(0), work_of(killed[0]) / name)
    again = ["3", "4", "5"] if "manifest" in name else ["1", "2", "3", "4", "5"]
    assert resumed(killed, capsys) in (again, ["4", "5"]) and how != "removed" or how == "removed"


@pytest.mark.parametrize("seed", range(FUZZ))
def test_random_damage_to_any_of_the_files(seed, killed, capsys):
    draw = random.Random(seed)
    place, _ = killed
    for number in range(RANDOM):
        work = work_of(place)
        what = []
        for _ in range(draw.choice([1, 1, 2, 3, 6])):
            name, how = draw.choice(files_of(work)), draw.choice(list(DAMAGES))
            what.append((str(name), how))
            DAMAGES[how](draw, work / name)
        try:
            steps = resumed(killed, capsys)
        except Exception as error:
            raise AssertionError(f"seed {seed} number {number}: {what}") from error
        assert steps in (["4", "5"], ["3", "4", "5"], ["1", "2", "3", "4", "5"]), (what, steps)


@pytest.mark.parametrize(
    "what",
    [
        "a file as the work folder",
        "a file as a checkpoint",
        "an empty newest checkpoint",
        "a dead link as a checkpoint",
        "a foreign folder",
        "a checkpoint beyond the end",
        "an empty work folder",
        "no checkpoint",
        "one checkpoint in two places",
    ],
)
def test_odd_work_folder(what, killed, capsys):
    work = work_of(killed[0])
    if what == "a file as the work folder":
        shutil.rmtree(work)
        work.write_text("x")
    elif what == "a file as a checkpoint":
        (work / "checkpoint-9").write_text("x")
    elif what == "an empty newest checkpoint":
        (work / "checkpoint-4").mkdir()
    elif what == "a dead link as a checkpoint":
        (work / "checkpoint-4").symlink_to("nowhere")
    elif what == "a foreign folder":
        (work / "checkpoint-x").mkdir()
    elif what == "a checkpoint beyond the end":
        shutil.copytree(work / "checkpoint-3", work / "checkpoint-77")
    elif what == "one checkpoint in two places":
        shutil.copytree(work / "checkpoint-2", work / "checkpoint-4")
    elif what == "an empty work folder":
        shutil.rmtree(work)
        work.mkdir()
    else:
        for folder in work.glob("checkpoint-*"):
            shutil.rmtree(folder)
    assert resumed(killed, capsys)
