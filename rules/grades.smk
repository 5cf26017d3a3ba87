"""Requires: iter{t}/responses/, a preference model or a judge behind an API. Gives: iter{t}/grades/{shard}.parquet, for pairs.construction graded."""


def grade_files(wildcards, t=None):
    """All shards of a run's own grades, by which its pairs are chosen; none where they are chosen by preferences."""
    run = settings(wildcards)
    folder = artifact(run_of(wildcards), t or wildcards.t, "grades")
    return (
        [f"{folder}/{shard}.parquet" for shard in range(run["responses"]["shards"])]
        if run["pairs"]["construction"] == "graded"
        else []
    )


def preference_shards(wildcards, t=None):
    """All shards of the preferences by which a run's pairs are chosen; none where grades or gold responses choose them."""
    return (
        shards(wildcards, "preferences", t)
        if settings(wildcards)["pairs"]["construction"] in ("best_vs_worst", "all")
        else []
    )


def by_preference(wildcards):
    """Whether the run's own preference model grades, and no judge behind an API."""
    return settings(wildcards)["grades"]["judge"] == "preference"


def grader(wildcards):
    """Who grades; the run's preference model with what it reads and how its logits become probabilities."""
    run = settings(wildcards)
    if not by_preference(wildcards):
        return flags(run["grades"])
    estimate = {key: run["pairs"][key] for key in ("probability", "logit_scale")}
    return flags(run["grades"]) + comparison_flags(wildcards) + flags(estimate)


rule grade_responses:
    """A grade from 0 to 6 of every response and of the gold one: by the preference model, or a rubric behind an API."""
    input:
        prompts=lambda wildcards: sampled(wildcards, "prompts.parquet"),
        responses=lambda wildcards: sampled(wildcards, f"responses/{wildcards.shard}.parquet"),
        gold=lambda wildcards: settings(wildcards)["pairs"]["gold"] or [],
        policy=BASE_POLICY,
        ranker_base=lambda wildcards: (
            ranker_base(run_of(wildcards)) if by_preference(wildcards) else []
        ),
        model=lambda wildcards: (
            preference_model_files(run_of(wildcards)) if by_preference(wildcards) else []
        ),
    output:
        grades=at("grades/{shard}.parquet"),
        record=record(at("grades/{shard}.parquet")),
    log:
        f"{LOGS}{{run}}iter{{t}}/grade_responses.{{shard}}.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/grade_responses.{{shard}}.tsv"
    conda:
        "../envs/eval.yaml"
    threads: MODEL_THREADS
    resources:
        mem_mb=8000,
        runtime=240,
        gpu=gpus_if(by_preference),
    params:
        version=STAGES["grade"],
        options=grader,
    message:
        "Grading responses of {wildcards.run}iteration {wildcards.t}, shard {wildcards.shard}"
    shell:
        f"{PYTHON} {SRC}/other_methods/grade_responses.py"
        " --prompts {input.prompts:q}"
        " --responses {input.responses:q} --gold {input.gold:q} --policy {input.policy:q}"
        " --ranker-base {input.ranker_base:q}"
        f" --device {DEVICE}"
        " {params.options:q}"
        " --output {output.grades:q} 2>&1 | tee {log:q}"
