"""Damage to the work folder of a killed training.

The resumed training must give the weights of an undisturbed one, or end with one error line.
FUZZ=5 runs five seeds of random damage instead of one.
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
    printed_steps,
)

from sppo.core.errors import UserError

FUZZ = int(os.environ.get("FUZZ", "1"))
RANDOM = 20  # cases of random damage per seed
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
    contents = [
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
    file.write_bytes(draw.choice(contents))


DAMAGES: dict[str, Callable[[random.Random, Path], object]] = {
    "removed": lambda draw, file: file.unlink(),
    "emptied": lambda draw, file: file.write_bytes(b""),
    "cut": cut,
    "a bit flipped": flip,
    "longer": lengthen,
    "a folder": to_folder,
    "a dead link": to_dead_link,
    "other content": replace,
    "unreadable": lambda draw, file: file.chmod(0),
}


def work_of(place: Place) -> Path:
    """Restore the work folder that the killed training left, and remove all other outputs."""
    work = place.folder / ".policy.work"
    for folder in (work, place.folder / "policy"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.unlink(missing_ok=True)
    for file in (place.folder / "policy.jsonl", *place.folder.glob("policy*.record.json")):
        file.unlink(missing_ok=True)
    return Path(shutil.copytree(place.folder / "kept", work, symlinks=True))


def resumed(killed, capsys) -> list[str]:
    """Resume the training, check the weights, and return the steps that were trained.

    If the training ends with an error line, check that it leaves nothing and return the line.
    """
    place, whole = killed
    capsys.readouterr()
    try:
        weights = place.train("policy", **RESUMABLE)
    except UserError as error:
        assert "\n" not in str(error)
        assert str(place.folder) in str(error)
        assert not (place.folder / "policy").exists()
        assert not list(place.folder.glob("*.tmp"))
        return [f"refused: {error}"]
    assert distance(whole, weights) < 1e-7
    assert not [path for path in place.folder.iterdir() if path.name.startswith(".")]
    return printed_steps(capsys)


def files_of(work: Path) -> list[Path]:
    """All files in the work folder, relative to it, sorted."""
    return sorted(file.relative_to(work) for file in work.rglob("*") if file.is_file())


def test_every_file_of_the_newest_checkpoint_in_turn(killed, capsys):
    draw = random.Random(0)
    place, _ = killed
    names = [name for name in files_of(work_of(place)) if name.parts[0] == "checkpoint-3"]
    for name in names:
        how = draw.choice(list(DAMAGES))
        DAMAGES[how](draw, work_of(place) / name)
        # The administrator can read every file.
        harmless = how == "unreadable" and os.geteuid() == 0
        expected = ["4", "5"] if harmless else ["3", "4", "5"]
        assert resumed(killed, capsys) == expected, (name, how)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["made_for.json", "checkpoint-3/manifest.json"])
def test_label_and_manifest_in_every_way(name, how, killed, capsys):
    DAMAGES[how](random.Random(0), work_of(killed[0]) / name)
    again = ["3", "4", "5"] if "manifest" in name else ["1", "2", "3", "4", "5"]
    steps = resumed(killed, capsys)
    if how != "removed":
        assert steps in (again, ["4", "5"])


@pytest.mark.parametrize("seed", range(FUZZ))
def test_random_damage_to_any_of_the_files(seed, killed, capsys):
    draw = random.Random(seed)
    place, _ = killed
    for number in range(RANDOM):
        work = work_of(place)
        damages = []
        for _ in range(draw.choice([1, 1, 2, 3, 6])):
            name = draw.choice(files_of(work))
            how = draw.choice(list(DAMAGES))
            damages.append((str(name), how))
            DAMAGES[how](draw, work / name)
        try:
            steps = resumed(killed, capsys)
        except Exception as error:
            raise AssertionError(f"seed {seed} number {number}: {damages}") from error
        assert steps in (["4", "5"], ["3", "4", "5"], ["1", "2", "3", "4", "5"]), (damages, steps)


def remove_checkpoints(work: Path) -> None:
    for folder in work.glob("checkpoint-*"):
        shutil.rmtree(folder)


def empty(work: Path) -> None:
    shutil.rmtree(work)
    work.mkdir()


def to_file(work: Path) -> None:
    shutil.rmtree(work)
    work.write_text("x")


ODD_FOLDERS: dict[str, Callable[[Path], object]] = {
    "a file as the work folder": to_file,
    "a file as a checkpoint": lambda work: (work / "checkpoint-9").write_text("x"),
    "an empty newest checkpoint": lambda work: (work / "checkpoint-4").mkdir(),
    "a dead link as a checkpoint": lambda work: (work / "checkpoint-4").symlink_to("nowhere"),
    "a foreign folder": lambda work: (work / "checkpoint-x").mkdir(),
    "a checkpoint beyond the end": lambda work: shutil.copytree(
        work / "checkpoint-3", work / "checkpoint-77"
    ),
    "an empty work folder": empty,
    "no checkpoint": remove_checkpoints,
    "one checkpoint in two places": lambda work: shutil.copytree(
        work / "checkpoint-2", work / "checkpoint-4"
    ),
}


@pytest.mark.parametrize("what", ODD_FOLDERS)
def test_odd_work_folder(what, killed, capsys):
    ODD_FOLDERS[what](work_of(killed[0]))
    assert resumed(killed, capsys)
