"""Requires: iter{t}/responses/, a preference model or API. Gives: iter{t}/grades/{shard}.parquet.

The grades are for pairs.construction graded.
"""


def grade_files(wildcards, t=None):
    """All shards of a run's grades; empty if its pairs are not chosen by grades."""
    run = settings(wildcards)
    if run["pairs"]["construction"] != "graded":
        return []
    folder = artifact(run_of(wildcards), t or wildcards.t, "grades")
    return [f"{folder}/{shard}.parquet" for shard in range(run["responses"]["shards"])]


def preference_shards(wildcards, t=None):
    """All shards of a run's preferences; empty if its pairs are not chosen by preferences."""
    if settings(wildcards)["pairs"]["construction"] in WITHOUT_PREFERENCES:
        return []
    return shards(wildcards, "preferences", t)


def by_preference(wildcards):
    """Whether the run's preference model grades, and not a judge behind an API."""
    return settings(wildcards)["grades"]["judge"] == "preference"


def grader(wildcards):
    """The flags of the grader: a judge behind an API, or the run's preference model."""
    run = settings(wildcards)
    if not by_preference(wildcards):
        return flags(run["grades"])
    estimate = {key: run["pairs"][key] for key in ("probability", "logit_scale")}
    return flags(run["grades"]) + comparison_flags(wildcards) + flags(estimate)


rule grade_responses:
    """Grade every response, and the gold response, from 0 to 6."""
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
