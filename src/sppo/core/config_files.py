"""The files of a configuration: `extends`, and checks that Snakemake's loader does not make."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from sppo.core.artifacts import parse_json, shipped
from sppo.core.errors import UserError, explained, fail


def check_command_line(words: list[str]) -> None:
    """Apply `check_files` to the files after --configfile; an error ends the program with one line.

    The profiles call this function, because Snakemake reads these files before the Snakefile.
    Snakemake takes every word up to the next option as a file, even targets.

    words: the words of a Snakemake command.
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
            fail(
                f"{file}, read as configuration, does not exist; if it is a target, put -- before "
                "it"
            )
    try:
        check_files(files)
    except Exception as error:
        if explained(error) is None:
            raise
        fail(explained(error) or "")


def check_files(files: Iterable[str | os.PathLike[str]]) -> None:
    """Check that every file is YAML or JSON in UTF-8, and has keys, but no key twice.

    A repeated key is refused because a loader silently drops the first value. A part that contains
    itself is refused as well. UserError if a check fails.
    """
    for file in files:
        try:
            text = _text(file)
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
        # PyYAML raises the last four for a value that does not match its tag, or an invalid date.
        except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error)
            if len(reason) > 300:
                reason = f"{reason[:297]}..."
            line = f"{shown(file)} is not a configuration in YAML ({reason}); correct it"
            raise UserError(line) from None
        if not isinstance(content, dict):
            line = (
                f"{shown(file)} has no keys; write key: value, or {{}} if there is nothing to set"
            )
            raise UserError(line)


def read_files(files: Iterable[str | os.PathLike[str]]) -> dict[str, Any]:
    """The merged configuration of several files; later files override earlier ones.

    A file with `extends: <another file>` overrides that file, whose path starts at the working
    directory or at the repository. UserError as for `check_files`, and if a file extends itself.
    """
    paths = [Path(file) for file in files]
    written: dict[str, Any] = {}
    # What the files extend comes first, so that it overrides no key of an earlier file.
    for path in paths:
        written = merged(written, _extended(path, ()))
    for path in paths:
        written = merged(written, _own(path))
    return written


def extended_by(files: Iterable[str | os.PathLike[str]]) -> list[Any]:
    """What the files say after `extends`."""
    return [_content(Path(file)).get("extends") for file in files]


def all_files(files: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files and the files that they extend, in reading order."""
    found: list[Path] = []
    for file in files:
        chain = [Path(file)]
        while (extended := _content(chain[-1]).get("extends")) is not None:
            if not isinstance(extended, str) or shipped(extended) in chain:
                break  # `read_files` reports it
            chain.append(shipped(extended))
        found += reversed(chain)
    return found


def _extended(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The configuration that a file extends; empty if it extends none.

    above: the files that led to this one by `extends`.
    """
    if not file.is_file():
        named = f", which {shown(above[-1])} extends," if above else ""
        problem = "is a folder" if file.is_dir() else "is missing"
        raise UserError(f"{file}{named} {problem}; correct the path")
    extended = _content(file).get("extends")
    if extended is None:
        return {}
    if not isinstance(extended, str) or not extended:
        raise UserError(f"{shown(file)}: extends is {extended!r}; give the path of one file")
    path = shipped(os.path.expanduser(extended))
    if path.absolute() in [other.absolute() for other in (*above, file)]:
        raise UserError(f"{shown(file)} extends {extended}, which extends it; remove one `extends`")
    return merged(_extended(path, (*above, file)), _own(path))


def _own(file: Path) -> dict[str, Any]:
    """The checked content of a file without `extends`."""
    return {key: value for key, value in _content(file).items() if key != "extends"}


def _content(file: Path) -> dict[str, Any]:
    """The checked content of a file."""
    check_files([file])
    return yaml.safe_load(_text(file))


def _text(file: str | os.PathLike[str]) -> str:
    """The text of a file, as YAML: JSON allows tabs between values, YAML does not."""
    text = Path(file).read_text(encoding="utf-8")
    return text.replace("\t", " ") if _is_json(text) else text


def merged(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `overlay`, section by section, as Snakemake merges files."""
    result = dict(base)
    for key, value in overlay.items():
        section = result.get(key)
        if isinstance(section, dict) and isinstance(value, dict):
            value = merged(section, value)
        result[key] = value
    return result


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _check_node(node: yaml.Node, file: str, above: tuple[yaml.Node, ...]) -> None:
    """UserError if a mapping has a key twice, or if `node` is one of the nodes that contain it.

    above: the nodes that contain `node`.
    """
    if any(node is other for other in above):
        line = node.start_mark.line + 1
        raise UserError(
            f"{file} line {line}: the anchor here contains itself; write out what it stands for"
        )
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
                        f"{file} has the key {key.value} twice, in lines {lines[key.value]} and "
                        f"{line}; put both under one"
                    )
                lines[key.value] = line
            _check_node(value, file, above)


def files_hint(files: Iterable[str | os.PathLike[str]]) -> str:
    """The list of files, to add to an error message; "" if the configuration is a single file."""
    names = [shown(file) for file in files]
    if len(names) < 2:
        return ""
    targets = any(Path(name).parts[0] == "results" for name in names)
    advice = "; put -- before targets" if targets else ""
    return f" (read as configuration: {', '.join(names)}{advice})"


def shown(file: str | os.PathLike[str]) -> str:
    """A file's path for a message: relative to the current folder if the file is in it."""
    path = Path(file)
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return str(path)
