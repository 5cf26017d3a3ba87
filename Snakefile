"""Self-play preference optimisation (arXiv 2405.00675) as one workflow.

    snakemake --cores all results/iter3/alpaca_eval.json

Each iteration has the stages prompts -> responses -> preferences -> pairs -> reference
log-probabilities -> policy. Every policy is evaluated. Each stage has a file in rules/, and each
rule runs a program in src/.
"""

from snakemake.utils import min_version

min_version("9.0")


report: "rules/captions/workflow.rst"


include: "rules/common.smk"  # reads the configuration
include: "rules/policies.smk"
include: "rules/prompts.smk"
include: "rules/responses.smk"
include: "rules/preferences.smk"
include: "rules/grades.smk"
include: "rules/training.smk"


for name in dict.fromkeys(each.rule_file for each in EVALUATIONS):
    if not (REPOSITORY / f"rules/{name}.smk").is_file():
        fail(f"the evaluation {name} has no file of rules, rules/{name}.smk; write it")

    include: f"rules/{name}.smk"


include: "rules/best_of_n.smk"
include: "rules/tables.smk"
include: "rules/report.smk"
include: "rules/theory.smk"
include: "rules/study.smk"
include: "rules/hub.smk"


# Runs that the target `compare` makes in addition to the main run.
COMPARED = ("sppo_hard", "dpo", "ipo", "inpo", "mpo")


localrules:
    all,
    everything,
    compare,
    compare_all,
    theory,
    word_game,
    study,
    overoptimisation,


rule all:
    """Evaluate every iteration of the main run and make their table.

    With `push_to_hub`, also upload the policies.
    """
    default_target: True
    input:
        summary_files(""),
        pushed_policies(),


rule everything:
    """Make all evaluations of the main run, best of n of its last policy, and the K = 2 run.

    It also makes the training figure and the response browser, if it can show the run. The tables
    and the heatmaps show the evaluations that exist, so they are separate targets, to be made after
    this one.
    """
    input:
        summary_files(""),
        [summary_files(run) for run in RUNS if run == "k2"],
        [
            artifact("", t, each.artifact)
            for t in range(MAIN["iterations"] + 1)
            for each in EVALUATIONS
            if t >= each.first_iteration
        ],
        artifact("", MAIN["iterations"], "best_of_n.svg"),
        [f"{ROOT}figures/training.svg"] if is_trained(MAIN) else [],
        [f"{ROOT}response_browser.html"] if is_browsable(MAIN) else [],


rule compare:
    """Make SPPO and the methods it is compared with, with equal prompts, K and token limits."""
    input:
        summary_files(""),
        [summary_files(run) for run in RUNS if run in COMPARED],


rule compare_all:
    """Make every run of the configuration. A second call continues where the first one stopped."""
    input:
        [summary_files(run) for run in RUNS],


rule theory:
    """Check the theory on games that can be solved exactly, and make a page with figures."""
    input:
        f"{ROOT}theory/README.md",


rule word_game:
    """Compare the trainer with the exact update, on the embedded policy and a game of words."""
    input:
        f"{ROOT}theory/word_game.md",


rule study:
    """Train the methods and their controls with several seeds, and make a page about them.

    It takes hours. A second call continues where the first one stopped.
    """
    input:
        f"{ROOT}study/study.md",


rule overoptimisation:
    """Train on learned copies of the annotators, and compare what each gains by copy and original.

    It takes hours. A second call continues where the first one stopped.
    """
    input:
        f"{ROOT}study/overoptimisation.md",
