"""run_forked: the jobs of a dry run in order, each in a forked process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run_forked
from sppo.core.artifacts import read_json, record_path
from sppo.core.errors import UserError
from sppo.core.tables import read_table

ROOT = Path(__file__).resolve().parents[2]
# b needs a; the path of a's output has a blank.
SNAKEFILE = """
rule b:
    input: "a file"
    output: "b"
    log: "logs/b.log"
    shell: "{PYTHON} second/program.py --x 'one two' {{input:q}} {{output:q}} {END}"

rule a:
    output: "a file"
    log: "logs/a.log"
    shell: "{PYTHON} first/program.py {{output:q}} {END}"
"""
TEE = "2>&1 | tee {log}"


@pytest.fixture
def workflow(tmp_path, monkeypatch):
    """Write a Snakefile of two rules into an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def write(program: str = sys.executable, end: str = TEE) -> None:
        text = SNAKEFILE.replace("{PYTHON}", program).replace("{END}", end)
        Path("Snakefile").write_text(text.replace("{{", "{").replace("}}", "}"), encoding="utf-8")

    return write


# --- reading Snakemake's plan ---


def test_jobs_come_in_an_order_that_works_with_their_words(workflow):
    workflow()
    assert run_forked.commands(["b"]) == [
        (["first/program.py", "a file"], "logs/a.log"),
        (["second/program.py", "--x", "one two", "a file", "b"], "logs/b.log"),
    ]
    Path("a file").touch()
    assert [log for _, log in run_forked.commands(["b"])] == ["logs/b.log"]


def test_nothing_to_be_done_runs_nothing(workflow, monkeypatch, capsys):
    workflow()
    Path("a file").touch()
    monkeypatch.setattr("sys.argv", ["run_forked.py", "a file"])
    run_forked.main()
    assert capsys.readouterr().out == "nothing to be done\n"


def test_job_of_another_form_is_refused(workflow):
    workflow(program="touch")
    with pytest.raises(UserError, match="this job is no Python program, so use snakemake: touch f"):
        run_forked.commands(["b"])
    workflow(end="")
    with pytest.raises(UserError, match=r"another form than `program 2>&1 \| tee log`"):
        run_forked.commands(["b"])


def test_refusal_of_snakemake_is_given_with_its_reason(workflow):
    workflow()
    with pytest.raises(UserError, match="^snakemake: MissingRuleException: ?No rule to produce c"):
        run_forked.commands(["c"])


def test_refused_configuration_is_the_checks_own_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "bad.yaml").write_text("train: {los: sppo}\n", encoding="utf-8")
    with pytest.raises(UserError, match="^config: unknown key train.los.* loss") as caught:
        run_forked.commands(["--configfile", f"{tmp_path}/bad.yaml", "--", "results/summary.md"])
    assert "\n" not in str(caught.value)


# --- running ---

DRIVER = """
import sys
sys.path.insert(0, {tools!r})
import _path, run_forked
from sppo.core.errors import run

def main():
    for number, program in enumerate(sys.argv[1:]):
        run_forked.forked([program, "word"], f"logs/{{number}}.log")
        print("done", program)

run(main)
"""


@pytest.fixture
def start(tmp_path):
    """Start programs of these texts, one after the other, in a process of their own."""

    def start(*texts: str) -> subprocess.Popen:
        names = []
        for number, text in enumerate(texts):
            folder = tmp_path / f"folder{number}"
            folder.mkdir()
            (folder / "_path.py").write_text(f"NAME = {folder.name!r}\n", encoding="utf-8")
            (folder / "program.py").write_text(text, encoding="utf-8")
            names.append(f"{folder.name}/program.py")
        driver = DRIVER.format(tools=str(ROOT / "src/tools"))
        return subprocess.Popen(
            [sys.executable, "-c", driver, *names],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def fork(start):
    """Run programs of these texts to their end."""

    def call(*texts: str) -> subprocess.CompletedProcess:
        with start(*texts) as started:
            output, errors = started.communicate()
        return subprocess.CompletedProcess([], started.returncode, output, errors)

    return call


GOOD = """
import _path, dataclasses, os, sys

@dataclasses.dataclass
class Local:
    name: str

if __name__ == "__main__":
    print(Local(_path.NAME), sys.argv[1:])
    print("warning", file=sys.stderr)
    os.system("echo child")
"""


def test_programs_run_in_order_with_their_output_in_the_log(fork, tmp_path):
    done = fork(GOOD, GOOD)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done folder0/program.py\ndone folder1/program.py\n"
    for number in range(2):
        lines = (tmp_path / f"logs/{number}.log").read_text(encoding="utf-8").splitlines()
        expected = [f"Local(name='folder{number}') ['word']", "warning", "child"]
        assert sorted(lines) == sorted(expected)


FAILING = {
    "traceback": ("def f():\n    raise KeyError('x')\nf()\n", "KeyError: 'x'"),
    "error line": (
        "import sys\nprint('error: no file', file=sys.stderr)\nsys.exit(1)\n",
        "no file",
    ),
    "exit with a text": ("import sys\nsys.exit('too small')\n", "Its last line: too small"),
    "wrong syntax": ("if\n", "SyntaxError: invalid syntax"),
    "killed": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", "no output"),
    "no output": ("import os\nos._exit(3)\n", "Its last line: no output"),
}


@pytest.mark.parametrize(("text", "said"), FAILING.values(), ids=FAILING)
def test_failing_program_stops_the_run_with_its_last_line(text, said, fork, tmp_path):
    done = fork(GOOD, text, GOOD)
    assert done.returncode == 1
    assert done.stdout == "done folder0/program.py\n"
    (line,) = done.stderr.splitlines()
    start = "error: folder1/program.py failed; see logs/1.log. Its last line: "
    assert line.startswith(start)
    assert said in line
    assert not (tmp_path / "logs/2.log").exists()


def test_exit_with_status_zero_is_no_failure(fork):
    assert fork("import sys\nsys.exit()\n", "raise SystemExit(0)\n").returncode == 0


SLEEPING = """
import os, time

with open("started.part", "w") as file:
    file.write(str(os.getpid()))
os.rename("started.part", "started")
time.sleep(600)
"""


def test_kill_ends_the_job_that_runs(start, tmp_path):
    with start(SLEEPING, GOOD) as driver:
        started = tmp_path / "started"
        while not started.exists() and driver.poll() is None:
            time.sleep(0.05)
        job = int(started.read_text(encoding="utf-8"))
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(job, 0)
    assert not (tmp_path / "logs/1.log").exists()


def test_prompts_of_a_policy_are_drawn_as_by_snakemake(tmp_path, tiny_policy, copy_repository):
    """The whole program; afterwards Snakemake finds nothing to do."""
    folder = copy_repository(tmp_path / "copy")
    words = ["results/iter1/prompts.parquet", "--config", f"policy={{model: {tiny_policy}}}"]
    words += ["prompts={per_iteration: 7}"]
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "src/tools/run_forked.py", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("1 of 2: results/logs/base_policy, ")
    assert second.startswith("2 of 2: results/logs/iter1/sample_prompts, ")
    prompts = folder / "results/iter1/prompts.parquet"
    assert len(read_table(prompts, "prompts")) == 7
    assert read_json(record_path(prompts))["stage"] == "sample"
    again = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "1", "--dry-run", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "Nothing to be done" in again.stdout + again.stderr
