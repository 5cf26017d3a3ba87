"""Requires: iter{t}/responses/, a preference model. Gives: iter{t}/preferences/{shard}.parquet, iter{t}/pairs.parquet."""


def preference_model_files(wildcards):
    """The adapter's files, so that a new adapter annotates anew."""
    return adapter_files(settings(wildcards)["preference"]["model"])


rule annotate_preferences:
    """All K x K logits of each prompt, both orders, by the preference model."""
    input:
        prompts=at("prompts.parquet"),
        responses=at("responses/{shard}.parquet"),
        policy=BASE_POLICY,
        ranker_base=ranker_base,
        model=preference_model_files,
    output:
        preferences=at("preferences/{shard}.parquet"),
        record=record(at("preferences/{shard}.parquet")),
    log:
        f"{LOGS}{{run}}iter{{t}}/annotate_preferences.{{shard}}.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/annotate_preferences.{{shard}}.tsv"
    conda:
        "../envs/core.yaml"
    threads: MODEL_THREADS
    resources:
        mem_mb=4000,
        runtime=240,
        gpu=MODEL_GPUS,
    params:
        version=STAGES["annotate"],
        options=section_flags("preference", skip=("probability", "logit_scale", "winner_by", "truncated")),
    message:
        "Comparing responses of {wildcards.run}iteration {wildcards.t}, shard {wildcards.shard}"
    shell:
        "{PYTHON} src/annotate_preferences.py --prompts {input.prompts} --responses {input.responses} --policy {input.policy}"
        " --ranker-base {input.ranker_base} --device {MAIN[device]} {params.options:q}"
        " --output {output.preferences} 2>&1 | tee {log}"


def previous_pairs(wildcards):
    """The previous iteration's pairs, where some of them are trained on again."""
    t = int(wildcards.t)
    return f"{ROOT}{wildcards.run}iter{t - 1}/pairs.parquet" if settings(wildcards)["pairs"]["replay"] and t > 1 else []


rule build_pairs:
    """P-hat of every response; winner and loser of every prompt."""
    input:
        prompts=lambda wildcards: sampled(wildcards, "prompts.parquet"),
        responses=lambda wildcards: shards(wildcards, "responses"),
        preferences=lambda wildcards: shards(wildcards, "preferences"),
        previous=previous_pairs,
        gold=lambda wildcards: settings(wildcards)["pairs"]["gold"] or [],
        policy=lambda wildcards: current_policy(wildcards) if settings(wildcards)["pairs"]["gold"] else [],
    output:
        pairs=at("pairs.parquet"),
        record=record(at("pairs.parquet")),
    log:
        f"{LOGS}{{run}}iter{{t}}/build_pairs.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/build_pairs.tsv"
    conda:
        "../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        version=STAGES["select"],
        options=section_flags("preference", skip=("model", "source")),
        construction=section_flags("pairs"),
        more=lambda wildcards, input: flags({"policy": input.policy or None, "previous": input.previous or None,
                                             "replay_seed": settings(wildcards)["seeds"]["data"]}),
    message:
        "Building the pairs of {wildcards.run}iteration {wildcards.t}"
    shell:
        "{PYTHON} src/build_pairs.py --prompts {input.prompts} --responses {input.responses} --preferences {input.preferences}"
        " {params.options:q} {params.construction:q} {params.more:q} --output {output.pairs} 2>&1 | tee {log}"
