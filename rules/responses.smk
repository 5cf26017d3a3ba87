"""Requires: iter{t}/prompts.parquet, iter{t-1}/policy. Gives: iter{t}/responses/{shard}.parquet."""


rule generate_responses:
    """Sample K responses to each prompt of one shard from the current policy."""
    input:
        prompts=at("prompts.parquet"),
        policy=current_policy,
    output:
        responses=at("responses/{shard}.parquet"),
        record=record(at("responses/{shard}.parquet")),
    log:
        f"{LOGS}{{run}}iter{{t}}/generate_responses.{{shard}}.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/generate_responses.{{shard}}.tsv"
    conda:
        ENGINE_ENVIRONMENT
    threads: MODEL_THREADS
    resources:
        mem_mb=6000,
        runtime=240,
        gpu=ENGINE_GPUS,
    params:
        version=STAGES["generate"],
        seed=lambda wildcards: settings(wildcards)["seeds"]["data"],
        options=section_flags("responses"),
        running=RUNNING,
    message:
        "Generating responses of {wildcards.run}iteration {wildcards.t}, shard {wildcards.shard}"
    shell:
        f"{PYTHON} {SRC}/generate_responses.py"
        " --prompts {input.prompts:q} --policy {input.policy:q}"
        " --iteration {wildcards.t} --shard {wildcards.shard} --seed {params.seed:q}"
        f" --device {DEVICE}"
        " {params.running:q} {params.options:q}"
        " --output {output.responses:q} 2>&1 | tee {log:q}"
