"""The files of a configuration: what they extend, and checks that Snakemake's loader lacks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from sppo.core.artifacts import parse_json, shipped
from sppo.core.errors import UserError, explained, fail


def check_command_line(words: list[str]) -> None:
    """`check_files` of the files that a command names after --configfile; one line ends it.

    The profiles call this, for Snakemake reads these files before the Snakefile. It takes every word
    up to the next option for a file, targets too.
    """
    files: list[str] = []
    takes_files = False
    for word in words:
        option, _, value = word.partition("=")
        if option.startswith("-"):
            takes_files = option in ("--configfile", "--configfiles")
        elif takes_files:
            value = word
        if takes_files and value:
            files.append(value)
    for file in files:
        if not Path(file).exists():
            fail(f"{file}, read as configuration, is not here; if it is a target, put -- before it")
    try:
        check_files(files)
    except Exception as error:
        if explained(error) is None:
            raise
        fail(explained(error) or "")


def check_files(files: Iterable[str | os.PathLike[str]]) -> None:
    """Every file is YAML or JSON in UTF-8, has keys, none twice, and no part that holds itself.

    Else UserError: of a key that stands twice a loader takes the last, and what stands under the
    first is lost without a word.
    """
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
            if _is_json(text):
                text = text.replace("\t", " ")  # only YAML forbids it between values
            root = yaml.compose(text, yaml.SafeLoader)
            if root is not None:
                _check_node(root, shown(file), ())
            content = yaml.safe_load(text)
        except UserError:
            raise
        except UnicodeDecodeError as error:
            line = f"{shown(file)} is not in UTF-8 (byte {error.start}); save it in that encoding"
            raise UserError(line) from None
        except RecursionError:
            line = f"{shown(file)} nests more deeply than can be read; correct it"
            raise UserError(line) from None
        # The last four are what a value that is not of its tag, or is no date, makes of PyYAML.
        except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error)
            reason = reason if len(reason) <= 300 else f"{reason[:297]}..."
            line = f"{shown(file)} is not a configuration in YAML ({reason}); correct it"
            raise UserError(line) from None
        if not isinstance(content, dict):
            line = (
                f"{shown(file)} has no keys; write key: value, or {{}} if there is nothing to set"
            )
            raise UserError(line)


def read_files(files: Iterable[str | os.PathLike[str]]) -> dict[str, Any]:
    """The configuration that files give together; a later one wins over an earlier one.

    A file can say `extends: <another file>`, by a path from the working directory or from the
    repository, and is then read on top of that one. Raises `UserError` as `check_files` does, and for a file that extends itself.
    """
    merged: dict[str, Any] = {}
    for file in files:
        update(merged, _with_extended(Path(file), ()))
    return merged


def all_files(files: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files and those that they extend, in the order in which they are read."""
    found: list[Path] = []
    for file in files:
        chain = [Path(file)]
        while (extended := _content(chain[-1]).get("extends")) is not None:
            if not isinstance(extended, str) or shipped(extended) in chain:
                break  # `read_files` reports it
            chain.append(shipped(extended))
        found += reversed(chain)
    return found


def _with_extended(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if not file.is_file():
        named = f", which {shown(above[-1])} extends," if above else ""
        raise UserError(f"{file}{named} is missing; correct the path")
    content = _content(file)
    extended = content.pop("extends", None)
    if extended is None:
        return content
    if not isinstance(extended, str):
        raise UserError(f"{shown(file)}: extends is {extended!r}; give the path of one file")
    if shipped(extended).absolute() in [path.absolute() for path in (*above, file)]:
        raise UserError(f"{shown(file)} extends {extended}, which extends it; remove one `extends`")
    base = _with_extended(shipped(extended), (*above, file))
    update(base, content)
    return base


def _content(file: Path) -> dict[str, Any]:
    check_files([file])
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def update(base: dict[str, Any], overlay: dict[str, Any]) -> None:
    """Put the keys of `overlay` over those of `base`, section by section, as Snakemake does."""
    for key, value in overlay.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            update(base[key], value)
        else:
            base[key] = value


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _check_node(node: yaml.Node, file: str, above: tuple[yaml.Node, ...]) -> None:
    if any(node is other for other in above):
        line = node.start_mark.line + 1
        raise UserError(f"{file} line {line}: the anchor here holds itself; write its part out")
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_node(item, file, above)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    raise UserError(
                        f"{file} has the key {key.value} twice, in lines {lines[key.value]} and"
                        f" {line}; put both under one"
                    )
                lines[key.value] = line
            _check_node(value, file, above)


def files_hint(files: Iterable[str | os.PathLike[str]]) -> str:
    """What to add to an error of a configuration that is read from several files; "" for one."""
    names = [shown(file) for file in files]
    if len(names) < 2:
        return ""
    targets = any(Path(name).parts[0] == "results" for name in names)
    advice = "; put -- before targets" if targets else ""
    return f" (read as configuration: {', '.join(names)}{advice})"


def shown(file: str | os.PathLike[str]) -> str:
    """A file's path as a user writes it: from the current folder where it lies in that."""
    path = Path(file)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
