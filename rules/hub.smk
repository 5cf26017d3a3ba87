"""Requires: the main run's policies and evaluations. Gives: iter{t}/pushed_to_hub.json.

It also gives a repository on the hub. The setting push_to_hub names the repository.
"""


def pushed_policies():
    """The files that record the upload of main's policies; empty if `push_to_hub` is not set."""
    return (
        [artifact("", t, "pushed_to_hub.json") for t in range(1, MAIN["iterations"] + 1)]
        if MAIN["push_to_hub"]
        else []
    )


rule push_policy:
    """Upload one policy, its card and its evaluation figures to `push_to_hub`."""
    input:
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
        " --policy {input.policy:q}"
        " --evaluation {input.evaluation:q} --repository {params.repository:q}"
        " --output {output.pushed:q} 2>&1 | tee {log:q}"
