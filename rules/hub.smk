"""Requires: the main run's policies, pairs and evaluations. Gives: iter{t}/pushed_to_hub.json.

It also gives iter{t}/preference_dataset, for any run, and repositories on the hub. The setting
push_to_hub names them.
"""


def prompts_of_pairs(wildcards):
    """The prompts of an iteration, and those of earlier ones if their pairs are used again."""
    t = int(wildcards.t)
    first = 1 if settings(wildcards)["replay"]["share"] else t
    return [sampled(wildcards, "prompts.parquet", each) for each in range(first, t + 1)]


rule export_pairs:
    """Write the pairs as a data set for other trainers."""
    input:
        pairs=at("pairs.parquet"),
        prompts=prompts_of_pairs,
    output:
        dataset=directory(at("preference_dataset")),
        record=record(at("preference_dataset")),
    log:
        f"{LOGS}{{run}}iter{{t}}/export_pairs.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/export_pairs.tsv"
    conda:
        "../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=lambda wildcards, attempt: 30 * attempt,
    params:
        version=STAGES["export"],
    message:
        "Writing the pairs of {wildcards.run}iteration {wildcards.t} as a data set"
    shell:
        f"{PYTHON} {SRC}/tools/export_pairs.py"
        " --pairs {input.pairs:q} --prompts {input.prompts:q} --output {output.dataset:q}"
        " 2>&1 | tee {log:q}"


def pushed_policies():
    """The files that record the upload of main's policies; empty if `push_to_hub` is not set."""
    return (
        [artifact("", t, "pushed_to_hub.json") for t in range(1, MAIN["iterations"] + 1)]
        if MAIN["push_to_hub"]
        else []
    )


rule push_policy:
    """Upload a policy with its evaluation figures, and the pairs it was trained on."""
    input:
        dataset=lambda wildcards: (
            []
            if MAIN["pairs"]["target_reward"]  # such pairs are not exported
            else artifact("", wildcards.t, "preference_dataset")
        ),
        policy=artifact("", "{t}", "policy"),
        evaluation=artifact("", "{t}", "alpaca_eval.json"),
    output:
        pushed=artifact("", "{t}", "pushed_to_hub.json"),
        record=record(artifact("", "{t}", "pushed_to_hub.json")),
    log:
        f"{LOGS}iter{{t}}/push_policy.log",
    benchmark:
        f"{BENCHMARKS}iter{{t}}/push_policy.tsv"
    wildcard_constraints:
        t=r"[1-9]\d*",
    localrule: True  # it needs the network, which compute nodes may not have
    conda:
        "../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        version=STAGES["push"],
        repository=lambda wildcards: (
            MAIN["push_to_hub"].replace("{t}", wildcards.t) if MAIN["push_to_hub"] else ""
        ),
    message:
        "Uploading the policy of iteration {wildcards.t} to the hub"
    shell:
        f"{PYTHON} {SRC}/tools/push_policy.py"
        " --policy {input.policy:q} --dataset {input.dataset:q}"
        " --evaluation {input.evaluation:q} --repository {params.repository:q}"
        " --output {output.pushed:q} 2>&1 | tee {log:q}"
