"""Self-play preference optimisation (arXiv 2405.00675) as one workflow.

    snakemake --cores all results/iter3/alpaca_eval.json

prompts -> responses -> preferences -> pairs -> reference log-probs -> policy, once an iteration, with
evaluations hung off every policy. One file in rules/ a stage; one small program in src/ a rule.
"""

configfile: "config/config.yaml"


include: "rules/common.smk"
include: "rules/policies.smk"
include: "rules/prompts.smk"
include: "rules/responses.smk"
include: "rules/preferences.smk"
include: "rules/training.smk"
include: "rules/alpaca_eval.smk"
include: "rules/best_of_n.smk"
include: "rules/mt_bench.smk"
include: "rules/open_llm.smk"
include: "rules/tables.smk"


localrules:
    all,


rule all:
    """Every iteration of the main run, evaluated, and the table of them."""
    default_target: True
    input:
        summary_files(""),
