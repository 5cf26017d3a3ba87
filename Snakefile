"""Self-play preference optimisation (arXiv 2405.00675) as one workflow.

    snakemake --cores all results/iter3/alpaca_eval.json

prompts -> responses -> preferences -> pairs -> reference log-probs -> policy, once per iteration, and
evaluations of every policy. Each stage has a file in rules/, each rule a small program in src/.
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

    include: f"rules/{name}.smk"


include: "rules/best_of_n.smk"
include: "rules/tables.smk"
include: "rules/report.smk"
include: "rules/theory.smk"
include: "rules/hub.smk"


# What `compare` runs beside the main run.
COMPARED = ("sppo_hard", "dpo", "ipo", "inpo", "mpo")


localrules:
    all,
    everything,
    compare,
    compare_all,
    theory,
    word_game,
    # What asks the network, which the nodes of a cluster may lack.
    base_policy,
    preference_model,
    sample_prompts,
    fetch_alpaca_eval,
    fetch_mt_bench,
    push_policy,


rule all:
    """Every iteration of the main run, evaluated, and the table of them; with `push_to_hub` on the hub too."""
    default_target: True
    input:
        summary_files(""),
        pushed_policies(),


rule everything:
    """Every evaluation of main's iterates, best-of-n of the last, the K = 2 run, and what the report shows of them.

    The tables and the heatmaps take what is there, so they are targets of their own, to be made after this one.
    """
    input:
        summary_files(""),
        [summary_files(run) for run in RUNS if run == "k2"],
        [
            artifact("", t, each.artifact)
            for t in range(MAIN["iterations"] + 1)
            for each in EVALUATIONS
        ],
        artifact("", MAIN["iterations"], "best_of_n.svg"),
        f"{ROOT}figures/training.svg",
        f"{ROOT}response_browser.html",


rule compare:
    """SPPO beside the methods that its paper and its successors measure themselves by, with the same prompts, K and tokens."""
    input:
        summary_files(""),
        [summary_files(run) for run in RUNS if run in COMPARED],


rule compare_all:
    """Every run of the configuration. What is finished stays; a second call goes on where the first stopped."""
    input:
        [summary_files(run) for run in RUNS],


rule theory:
    """Every claim of the theory on games that can be solved exactly, with figures and a page that says what they show."""
    input:
        f"{ROOT}theory/README.md",


rule word_game:
    """Whether the trainer trains the embedded policy as the theory says, on a game of words with known P."""
    input:
        f"{ROOT}theory/word_game.md",
