"""The files that a configuration is read from, checked for what Snakemake's own loader passes over. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import yaml

from sppo.errors import UserError


def check_files(files: Iterable[str | os.PathLike]) -> None:
    """Every file is YAML (or JSON) in UTF-8, has no key twice, and holds no part of itself; else UserError.

    Of a key that stands twice a loader takes the last, and what stands under the first is lost without a word.
    """
    for file in files:
        try:
            root = yaml.compose(Path(file).read_text(encoding="utf-8"), yaml.SafeLoader)
        except UnicodeDecodeError as error:
            raise UserError(f"{shown(file)} is not in UTF-8 (byte {error.start}); save it in that encoding") from None
        except yaml.YAMLError as error:
            raise UserError(f"{shown(file)} is not a configuration in YAML ({error}); correct it") from None
        if root is not None:
            _check_node(root, shown(file), ())


def _check_node(node: yaml.Node, file: str, above: tuple[yaml.Node, ...]) -> None:
    if any(node is other for other in above):
        raise UserError(f"{file} line {node.start_mark.line + 1}: the anchor here holds itself; write its part out")
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
                    raise UserError(f"{file} has the key {key.value} twice, in lines {lines[key.value]} and {line}; put both "
                                    "under one")
                lines[key.value] = line
            _check_node(value, file, above)


def files_hint(files: Iterable[str | os.PathLike]) -> str:
    """What to add to an error of a configuration that is read from several files; "" for a single one.

    Snakemake takes every word after --configfile for a file, targets too, unless -- stands before them.
    """
    names = [shown(file) for file in files]
    return f" (read as configuration: {', '.join(names)}; put -- before targets)" if len(names) > 1 else ""


def shown(file: str | os.PathLike) -> str:
    """A file's path as a user writes it: from the current folder where it lies in that."""
    return str(Path(file).relative_to(Path.cwd())) if Path(file).is_relative_to(Path.cwd()) else str(file)
