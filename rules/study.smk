"""Requires: iter{t}/policy and its pairs. Gives: iter{t}/measurements.json, study/, rankers/{n}.

The studies train many runs with many seeds. config/study.yaml and config/overoptimisation.yaml are
their plans. rankers/{n} is a copy of the preference model, learned from n comparisons.
"""


def measuring_flags(wildcards):
    """The flags that set how a policy samples and scores: the trainer's precision for both."""
    train = of_iteration(settings(wildcards)["train"], int(wildcards.t))
    responses = settings(wildcards)["responses"]
    of_scoring = ("micro_batch_size", "micro_batch_tokens", "precision", "beta")
    chosen = {key: train[key] for key in of_scoring}
    chosen["lora_rank"] = train["lora_rank"] or None
    keys = [key for key in (*ENGINE_KEYS, "max_new_tokens") if key != "precision"]
    return flags(chosen | {key: responses[key] for key in keys}) + RUNNING


rule measure_policy:
    """Measure log-ratios against their targets, and the distance of the policy to the base."""
    input:
        pairs=at("pairs.parquet"),
        current=logps("current"),
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


def shards_of_main(folder):
    """The paths of all shards of the main run's first iteration."""
    shards = range(MAIN["responses"]["shards"])
    return [artifact("", 1, f"{folder}/{shard}.parquet") for shard in shards]


rule distil_ranker:
    """Learn a copy of the preference model from n comparisons of the main run's iteration 1."""
    input:
        prompts=artifact("", 1, "prompts.parquet"),
        responses=shards_of_main("responses"),
        preferences=shards_of_main("preferences"),
        base=EMBEDDED_POLICY,
    output:
        ranker=directory(f"{ROOT}rankers/{{n}}"),
        record=record(f"{ROOT}rankers/{{n}}"),
    log:
        f"{LOGS}distil_ranker.{{n}}.log",
    benchmark:
        f"{BENCHMARKS}distil_ranker.{{n}}.tsv"
    wildcard_constraints:
        n=r"\d+",
    conda:
        "../envs/core.yaml"
    threads: MODEL_THREADS
    resources:
        mem_mb=lambda wildcards, attempt: 6000 * attempt,
        runtime=lambda wildcards, attempt: 120 * attempt,
    params:
        version=STAGES["distil"],
    message:
        "Learning a copy of the preference model from {wildcards.n} comparisons"
    shell:
        f"{PYTHON} {SRC}/tools/distil_ranker.py"
        " --prompts {input.prompts:q} --responses {input.responses:q}"
        " --preferences {input.preferences:q} --base {input.base:q}"
        " --comparisons {wildcards.n} --output {output.ranker:q} 2>&1 | tee {log:q}"


rule make_study_rows:
    """Make the runs of a study that have no row yet. Each finished run adds a row at once."""
    input:
        plan=lambda wildcards: shipped(f"config/{wildcards.study}.yaml"),
    output:
        rows=f"{ROOT}study/{{study}}.jsonl",
        record=record(f"{ROOT}study/{{study}}.jsonl"),
    log:
        f"{LOGS}make_study_rows.{{study}}.log",
    benchmark:
        f"{BENCHMARKS}make_study_rows.{{study}}.tsv"
    wildcard_constraints:
        study="study|overoptimisation",
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
        "Making the runs of the {wildcards.study}; the repository's rows are extended run by run"
    shell:
        f"{PYTHON} {SRC}/tools/run_study.py"
        " --plan {input.plan:q} --output {output.rows:q} 2>&1 | tee {log:q}"


STUDY_FIGURES = [f"{ROOT}study/study_{name}.svg" for name in ("win_rates", "log_ratios")]


rule tabulate_study:
    """Write the study's page: means over seeds, tests, and figures."""
    input:
        rows=f"{ROOT}study/study.jsonl",
        plan=shipped("config/study.yaml"),
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
        " --rows {input.rows:q} --plan {input.plan:q} --output {output.page:q}"
        " 2>&1 | tee {log:q}"


OVEROPTIMISATION = f"{ROOT}study/overoptimisation"


rule plot_overoptimisation:
    """Plot what a policy gains by its proxy and by the gold annotators, over its distance."""
    input:
        rows=f"{OVEROPTIMISATION}.jsonl",
    output:
        page=f"{OVEROPTIMISATION}.md",
        figure=f"{OVEROPTIMISATION}.svg",
        page_record=record(f"{OVEROPTIMISATION}.md"),
        figure_record=record(f"{OVEROPTIMISATION}.svg"),
    log:
        f"{LOGS}plot_overoptimisation.log",
    benchmark:
        f"{BENCHMARKS}plot_overoptimisation.tsv"
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 20 * attempt,
    params:
        version=STAGES["tabulate"],
    message:
        "Plotting gold and proxy win rates over the distance to the base"
    shell:
        f"{PYTHON} {SRC}/reporting/plot_overoptimisation.py"
        " --rows {input.rows:q} --output {output.page:q} 2>&1 | tee {log:q}"
