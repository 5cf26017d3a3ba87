"""Requires: nothing; the games are part of the code. Gives: theory/README.md and its figures.

The page says what each method does on games that can be solved exactly. theory/checks.json holds
every claim of the theory with its value. theory/trained_policies.json says whether the real trainer
does what the theory says. theory/*.{csv,png,svg} are the figures of the page.
"""

THEORY_FIGURES = [
    "gap_by_iteration",
    "gap_by_horizon",
    "simplex",
    "regularised_gap",
    "self_improvement",
    "bt_control",
]


def theory_figure(name):
    """A figure, with its caption and category in the report."""
    return report(
        f"{ROOT}theory/{name}.svg",
        caption=f"captions/theory_{name}.rst",
        category="Theory",
        labels={"run": "exact games", "figure": name.replace("_", " ")},
    )


rule check_theory:
    """Check identities, bounds and numbers of the theory on embedded and random games."""
    input:
        [],  # the games are in src/sppo/theory/games.py
    output:
        checks=f"{ROOT}theory/checks.json",
        record=record(f"{ROOT}theory/checks.json"),
    log:
        f"{LOGS}check_theory.log",
    benchmark:
        f"{BENCHMARKS}check_theory.tsv"
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        version=STAGES["theory"],
    message:
        "Checking the theory on games that can be solved exactly"
    shell:
        f"{PYTHON} {SRC}/theory/check_theory.py" " --output {output.checks:q} 2>&1 | tee {log:q}"


rule train_on_games:
    """Train small policies by the real loss and trainer on a game with a known exact update."""
    input:
        [],  # the game is in the program
    output:
        json=f"{ROOT}theory/trained_policies.json",
        svg=theory_figure("trained_policies"),
        others=expand(f"{ROOT}theory/trained_policies.{{form}}", form=["csv", "png"]),
        json_record=record(f"{ROOT}theory/trained_policies.json"),
        svg_record=record(f"{ROOT}theory/trained_policies.svg"),
        other_records=[record(f"{ROOT}theory/trained_policies.{form}") for form in ("csv", "png")],
    log:
        f"{LOGS}train_on_games.log",
    benchmark:
        f"{BENCHMARKS}train_on_games.tsv"
    conda:
        "../envs/core.yaml"
    threads: MODEL_THREADS
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        version=STAGES["theory"],
    message:
        "Training small policies to compare them with the exact update"
    shell:
        f"{PYTHON} {SRC}/theory/train_on_games.py" " --output {output.json:q} 2>&1 | tee {log:q}"


rule plot_theory:
    """Plot each method on a cycle of three responses, and on a Bradley-Terry game as control."""
    input:
        checks=f"{ROOT}theory/checks.json",
        trained=f"{ROOT}theory/trained_policies.json",
    output:
        page=f"{ROOT}theory/README.md",
        page_record=record(f"{ROOT}theory/README.md"),
        svg=[theory_figure(name) for name in THEORY_FIGURES],
        svg_records=[record(f"{ROOT}theory/{name}.svg") for name in THEORY_FIGURES],
        others=expand(f"{ROOT}theory/{{name}}.{{form}}", name=THEORY_FIGURES, form=["csv", "png"]),
        other_records=expand(
            record(f"{ROOT}theory/{{name}}.{{form}}"), name=THEORY_FIGURES, form=["csv", "png"]
        ),
    log:
        f"{LOGS}plot_theory.log",
    benchmark:
        f"{BENCHMARKS}plot_theory.tsv"
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        version=STAGES["theory"],
    message:
        "Plotting what each method does on games that can be solved exactly"
    shell:
        f"{PYTHON} {SRC}/theory/plot_theory.py"
        " --checks {input.checks:q} --trained {input.trained:q}"
        " --output {output.page:q} 2>&1 | tee {log:q}"
