"""Write docs/configuration.md: every configuration key, from the schema.

Reads   config/schema.yaml, and the registries of losses that it names
Writes  the page as Markdown on standard output; with --check nothing, but it fails if the page is
        out of date
"""

from __future__ import annotations

import argparse
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import ROOT
from sppo.core.config import RENAMED, RENAMED_VALUES, schema
from sppo.core.errors import UserError, run

PAGE = ROOT / "docs" / "configuration.md"
COMMAND = ".venv/bin/python src/tools/document_configuration.py"
HEAD = f"""# Configuration

Made by `{COMMAND} > docs/configuration.md` from
[config/schema.yaml](../config/schema.yaml); a test keeps it up to date.

A configuration is a YAML file for `--configfile`, such as

```yaml
extends: config/config.yaml   # the demo; without this line the defaults below hold
name: mine                    # results/mine/
train: {{loss: dpo, beta: 0.1}}
runs:
  k2: {{responses: {{samples: 2}}}}   # results/mine/k2/
```

Without `--configfile` the demo's [config/config.yaml](../config/config.yaml) is read. Values can
also be given on the command line: `--config iterations=1 "train={{beta: 0.01}}"`. For each key, the
first of these that sets it wins: the run, `--config`, your file, the files that it extends, the
default. `null` undoes a value that an extended file set.

The main run is what the file itself describes; `runs` adds named runs. A run is checked when a file
of it is asked for. Relative paths start at the working directory, which is the repository's folder
unless you use the workflow as a module. A file that does not exist there is looked up in the
repository.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the page, print nothing")
    args = parser.parse_args()
    text = page()
    if not args.check:
        print(text, end="")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        raise UserError(f"{PAGE.name} is older than the schema; run {COMMAND} > docs/{PAGE.name}")


def page() -> str:
    """The whole page."""
    sections = schema()["properties"]
    plain = {key: rule for key, rule in sections.items() if "properties" not in rule}
    parts = [HEAD, "## Top level\n", table(plain)]
    for name, rule in sections.items():
        if "properties" in rule:
            parts += [f"## {name}\n", table(rule["properties"])]
    parts += ["## Old names\n", old_names()]
    return "\n".join(parts)


def table(keys: dict[str, Any]) -> str:
    """One row for each key."""
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for key, rule in keys.items():
        cells = (f"`{key}`", values(rule), default(rule), meaning(rule))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def values(rule: dict[str, Any]) -> str:
    """Which values a key takes."""
    if "enum" in rule:
        return ", ".join(f"`{written(value)}`" for value in rule["enum"])
    types = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    names = ", ".join("null" if name == "null" else name for name in types)
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
    }
    limits = [f"{words} {rule[bound]}" for bound, words in bounds.items() if bound in rule]
    return ", ".join([names, *limits])


def default(rule: dict[str, Any]) -> str:
    """The default, or one for each column of `settings`."""
    if "x-settings" not in rule:
        return f"`{written(rule['default'])}`"
    columns = rule["x-settings"].items()
    return ", ".join(f"{name}: `{written(value)}`" for name, value in columns)


def meaning(rule: dict[str, Any]) -> str:
    """The description, and when the key has an effect."""
    text = " ".join(rule["description"].split())
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    if "x-loss-parameter" in rule:
        losses = rule["x-only-with"]["train.loss"]["enum"]
        noun = "loss" if len(losses) == 1 else "losses"
        text += f" Only with the {noun} {', '.join(losses)}."
    return text


def written(value: Any) -> str:
    """A value as YAML spells it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else '""'


def old_names() -> str:
    rows = ["| old | now |", "|---|---|"]
    rows += [f"| `{old}` | `{new}` |" for old, new in RENAMED.items()]
    rows += [f"| `{key}: {old}` | `{key}: {new}` |" for (key, old), new in RENAMED_VALUES.items()]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    run(main)
