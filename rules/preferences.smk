"""Requires: iter{t}/responses/, a preference model. Gives: iter0/preference_model (PairRM), iter{t}/preferences/{shard}.parquet, iter{t}/pairs.parquet."""


def preference_model(run):
    """The preference model of a run as programs take it: its name, or the folder that PairRM is put into, one for all runs with the same."""
    chosen, of_main = (
        {key: RUNS[name]["preference"][key] for key in ("model", "revision", "backend")}
        for name in (run, "")
    )
    return (
        artifact("" if chosen == of_main else run, 0, "preference_model")
        if is_pairrm(chosen["model"])
        else chosen["model"]
    )


def preference_model_files(run):
    """What that lies in, so that a new one compares anew."""
    model = preference_model(run)
    return [model] if is_pairrm(RUNS[run]["preference"]["model"]) else adapter_files(model)


def ranker_base(run):
    """What the preference model of a run sits on, where it is an embedded one."""
    return [] if is_pairrm(RUNS[run]["preference"]["model"]) else EMBEDDED_POLICY


def comparison_flags(wildcards):
    """The preference model and what it reads; the embedded ones have nothing else to set."""
    chosen = settings(wildcards)["preference"]
    keys = (
        [key for key in COMPARISON if key not in ("model", "revision")]
        if is_pairrm(chosen["model"])
        else ["source"]
    )
    read = {"model": preference_model(run_of(wildcards))} | {key: chosen[key] for key in keys}
    return flags(read) + CHATS


rule preference_model:
    """PairRM in its place: links to a local folder or to the hub's files at a pinned revision. Refused here, not after sampling."""
    input:
        lambda wildcards: model_files(settings(wildcards)["preference"]["model"]),
    output:
        model=directory(f"{ROOT}{{run}}iter0/preference_model"),
        record=record(f"{ROOT}{{run}}iter0/preference_model"),
    log:
        f"{LOGS}{{run}}preference_model.log",
    benchmark:
        f"{BENCHMARKS}{{run}}preference_model.tsv"
    priority: 1
    conda:
        "../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        version=STAGES["preference_source"],
        options=lambda wildcards: flags(
            {
                key: settings(wildcards)["preference"][key]
                for key in ("model", "revision", "backend")
            }
        ),
    message:
        "Putting PairRM into {output.model}"
    shell:
        "{PYTHON} src/tools/prepare_preference_model.py {params.options:q} --output {output.model:q}"
        " 2>&1 | tee {log:q}"


rule annotate_preferences:
    """All K x K logits of each prompt, both orders, by the preference model."""
    input:
        prompts=at("prompts.parquet"),
        responses=at("responses/{shard}.parquet"),
        policy=BASE_POLICY,
        ranker_base=lambda wildcards: ranker_base(run_of(wildcards)),
        model=lambda wildcards: preference_model_files(run_of(wildcards)),
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
        mem_mb=8000,
        runtime=240,
        gpu=MODEL_GPUS,
    params:
        version=STAGES["annotate"],
        options=comparison_flags,
    message:
        "Comparing responses of {wildcards.run}iteration {wildcards.t}, shard {wildcards.shard}"
    shell:
        "{PYTHON} src/annotate_preferences.py --prompts {input.prompts:q}"
        " --responses {input.responses:q} --policy {input.policy:q}"
        " --ranker-base {input.ranker_base:q} --device {MAIN[device]} {params.options:q}"
        " --output {output.preferences:q} 2>&1 | tee {log:q}"


BY_THEMSELVES = [name for name, run in RUNS.items() if run["pairs"]["implicit"]]


rule annotate_implicitly:
    """All K x K logits of each prompt by the implicit reward of pi_t against the iterate before it."""
    input:
        prompts=at("prompts.parquet"),
        responses=at("responses/{shard}.parquet"),
        policy=current_policy,
        before=lambda wildcards: policy(run_of(wildcards), int(wildcards.t) - 2),
    output:
        preferences=at("preferences/{shard}.parquet"),
        record=record(at("preferences/{shard}.parquet")),
    log:
        f"{LOGS}{{run}}iter{{t}}/annotate_implicitly.{{shard}}.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/annotate_implicitly.{{shard}}.tsv"
    wildcard_constraints:
        run=any_of(BY_THEMSELVES),
        t=r"(?!1/)\d+",
    conda:
        "../envs/core.yaml"
    threads: MODEL_THREADS
    resources:
        mem_mb=6000,
        runtime=120,
        gpu=MODEL_GPUS,
    params:
        version=STAGES["annotate"],
        beta=lambda wildcards: of_iteration(settings(wildcards)["train"], int(wildcards.t) - 1)[
            "beta"
        ],
        options=lambda wildcards: scoring_flags(wildcards),  # of a file that is read later
        attention=lambda wildcards: flags({"attention": MAIN["policy"]["attention"]}),
    message:
        "Comparing responses of {wildcards.run}iteration {wildcards.t}, shard {wildcards.shard}, by the policy's own reward"
    shell:
        "{PYTHON} src/other_methods/annotate_implicitly.py --prompts {input.prompts:q}"
        " --responses {input.responses:q} --policy {input.policy:q} --before {input.before:q}"
        " --beta {params.beta:q} --device {MAIN[device]} {params.attention:q} {params.options:q}"
        " --output {output.preferences:q} 2>&1 | tee {log:q}"


ruleorder: annotate_implicitly > annotate_preferences


# llm-blender knows transformers 4 alone and so has an environment of its own.
BLENDING = [name for name, run in RUNS.items() if run["preference"]["backend"] == "llm_blender"]
if BLENDING:
    if workflow.is_main_process and not IN_CONDA:
        fail(
            "config: preference.backend is llm_blender, which needs an environment of its own; "
            "run with --use-conda, or set transformers"
        )

    use rule annotate_preferences as annotate_with_llm_blender with:
        wildcard_constraints:
            run=any_of(BLENDING),
        conda:
            "../envs/llm_blender.yaml"

    ruleorder: annotate_implicitly > annotate_with_llm_blender > annotate_preferences


def previous_pairs(wildcards):
    """An earlier iteration's pairs, where some of them are trained on again."""
    t, chosen = int(wildcards.t), settings(wildcards)["pairs"]
    return (
        artifact(
            run_of(wildcards), 1 if chosen["replay_from"] == "first" else t - 1, "pairs.parquet"
        )
        if chosen["replay"] and t > 1
        else []
    )


rule build_pairs:
    """P-hat of every response; winner and loser of every prompt."""
    input:
        prompts=lambda wildcards: sampled(wildcards, "prompts.parquet"),
        responses=lambda wildcards: shards(wildcards, "responses"),
        preferences=lambda wildcards: preference_shards(wildcards),
        grades=lambda wildcards: grade_files(wildcards),
        previous=previous_pairs,
        gold=lambda wildcards: settings(wildcards)["pairs"]["gold"] or [],
        policy=lambda wildcards: (
            current_policy(wildcards)
            if settings(wildcards)["pairs"]["gold"] or settings(wildcards)["pairs"]["goals"]
            else []
        ),
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
        options=section_flags("preference", skip=COMPARISON),
        construction=section_flags("pairs", skip=CHAINING),
        more=lambda wildcards, input: flags(
            {
                "policy": input.policy or None,
                "previous": input.previous or None,
                "replay_seed": settings(wildcards)["seeds"]["data"],
            }
        )
        + thresholds(wildcards)
        + CHATS,
    message:
        "Building the pairs of {wildcards.run}iteration {wildcards.t}"
    shell:
        "{PYTHON} src/build_pairs.py --prompts {input.prompts:q} --responses {input.responses:q}"
        " --preferences {input.preferences:q} --grades {input.grades:q} {params.options:q}"
        " {params.construction:q} {params.more:q} --output {output.pairs:q} 2>&1 | tee {log:q}"
