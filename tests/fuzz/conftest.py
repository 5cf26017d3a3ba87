"""A finished tiny run, made once for the tests that damage copies of it or compare with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fuzz.tiny_run import EVALUATION, POLICY, command, finish, make_copy


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_policy, copy_repository) -> tuple[Path, str]:
    """The run's folder, and Snakemake's output with all commands. Takes one or two minutes."""
    copy = make_copy(tmp_path_factory.mktemp("finished") / "sppo", copy_repository)
    return copy, finish(copy, command(tiny_policy, POLICY, EVALUATION, flags=("--printshellcmds",)))
