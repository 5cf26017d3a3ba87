"""Requires: iter{t}/policy and its pairs. Gives: iter{t}/measurements.json, study/study.md.

The study trains many runs with many seeds. config/study.yaml is its plan.
"""


def measuring_flags(wildcards):
    """The flags that set how a policy samples and scores: the trainer's precision for both."""
    train, responses = (settings(wildcards)[section] for section in ("train", "responses"))
    chosen = {key: train[key] for key in ("micro_batch_size", "precision", "beta")}
    chosen["lora_rank"] = train["lora_rank"] or None
    keys = ("engine", "tensor_parallel", "max_new_tokens", "batch_size")
    return flags(chosen | {key: responses[key] for key in keys}) + RUNNING


rule measure_policy:
    """Measure log-ratios against their targets, and the distance of the policy to the base."""
    input:
        pairs=at("pairs.parquet"),
        current=at("logps/current.parquet"),
        policy=this_policy,
        prompts=lambda wildcards: sampled(wildcards, "prompts.parquet"),
        base=BASE_POLICY,
    output:
        measurements=at("measurements.json"),
        record=record(at("measurements.json")),
    log:
        f"{LOGS}{{run}}iter{{t}}/measurements.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/measurements.tsv"
    conda:
        ENGINE_ENVIRONMENT
    threads: MODEL_THREADS
    resources:
        mem_mb=6000,
        runtime=120,
        gpu=ENGINE_GPUS,
    params:
        version=STAGES["measure"],
        seed=lambda wildcards: settings(wildcards)["seeds"]["data"],
        options=measuring_flags,
    message:
        "Measuring the policy of {wildcards.run}iteration {wildcards.t}"
    shell:
        f"{PYTHON} {SRC}/evaluation/measure_policy.py"
        " --pairs {input.pairs:q} --current {input.current:q} --policy {input.policy:q}"
        " --prompts {input.prompts:q} --base {input.base:q}"
        " --iteration {wildcards.t} --seed {params.seed:q}"
        f" --device {DEVICE}"
        " {params.options:q} --output {output.measurements:q}"
        " 2>&1 | tee {log:q}"


rule make_study_rows:
    """Make the runs of the study that have no row yet. Each finished run adds a row at once."""
    input:
        plan=shipped("config/study.yaml"),
    output:
        rows=f"{ROOT}study/study.jsonl",
        record=record(f"{ROOT}study/study.jsonl"),
    log:
        f"{LOGS}make_study_rows.log",
    benchmark:
        f"{BENCHMARKS}make_study_rows.tsv"
    conda:
        "../envs/core.yaml"
    threads: MODEL_THREADS
    resources:
        mem_mb=8000,
        runtime=1440,
        gpu=MODEL_GPUS,
    params:
        version=STAGES["tabulate"],
    message:
        "Making the runs of the study; rows are added to the repository's study.jsonl"
    shell:
        f"{PYTHON} {SRC}/tools/run_study.py"
        " --plan {input.plan:q} --output {output.rows:q} 2>&1 | tee {log:q}"


STUDY_FIGURES = [f"{ROOT}study/study_{name}.svg" for name in ("win_rates", "log_ratios")]


rule tabulate_study:
    """Write the study's page: means over seeds, tests, and figures."""
    input:
        rows=f"{ROOT}study/study.jsonl",
    output:
        page=f"{ROOT}study/study.md",
        figures=STUDY_FIGURES,
        page_record=record(f"{ROOT}study/study.md"),
        figure_records=[record(figure) for figure in STUDY_FIGURES],
    log:
        f"{LOGS}tabulate_study.log",
    benchmark:
        f"{BENCHMARKS}tabulate_study.tsv"
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 20 * attempt,
    params:
        version=STAGES["tabulate"],
    message:
        "Writing the page of the study"
    shell:
        f"{PYTHON} {SRC}/reporting/tabulate_study.py"
        " --rows {input.rows:q} --output {output.page:q} 2>&1 | tee {log:q}"
