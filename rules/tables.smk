"""Requires: the evaluations of a run's iterations. Gives: summary.md and
figures/{win_rate,length}.{png,svg} of that run; figures/pairwise_{ranker,judge}.{csv,png,svg};
tables/*.{csv,md,tex}, tables/all.{md,html} and tables/measured.md, the papers' figures with ours
beside them.
"""

import csv

PUBLISHED = shipped("config/published")
with open(PUBLISHED / "index.csv", encoding="utf-8", newline="") as stream:
    PAPER_TABLES = [line["table"] for line in csv.DictReader(stream)]


def iterations(wildcards):
    """0 to T of the run."""
    return range(settings(wildcards)["iterations"] + 1)


def base_of(wildcards):
    """Where the base is evaluated for a run: as main's iter0, unless the run evaluates otherwise."""
    run = settings(wildcards)
    name = run_of(wildcards)
    same_judge = run["alpaca_eval"] == MAIN["alpaca_eval"]
    as_main = same_judge and preference_model(name) == preference_model("")
    return "" if as_main else name


def of_every_iteration(name):
    """Input function: one artifact of each iteration."""
    return lambda wildcards: [
        artifact(run_of(wildcards) if t else base_of(wildcards), t, name)
        for t in iterations(wildcards)
    ]


def records_of_every_iteration(wildcards):
    """Records whose seconds add up to an iteration's minutes."""
    run = run_of(wildcards)
    made = [
        artifact(run if t else base_of(wildcards), t, name)
        for t in iterations(wildcards)
        for name in ("alpaca_eval_outputs.json", "alpaca_eval.json")
    ]
    for t in range(1, settings(wildcards)["iterations"] + 1):
        if settings(wildcards)["extrapolation"] is not None:
            made.append(artifact(run, t, "policy"))
            continue
        made += (
            shards(wildcards, "responses", t)
            + grade_files(wildcards, t)
            + preference_shards(wildcards, t)
        )
        made += [
            artifact(run, t, name) for name in ("pairs.parquet", "logps/current.parquet", "policy")
        ]
    return [record(path) for path in made]


def summary_files(run):
    """What the summary of a run consists of."""
    folder = folder_of(run)
    return [
        f"{folder}summary.md",
        *(
            f"{folder}figures/{name}.{form}"
            for name in ("win_rate", "length")
            for form in ("png", "svg")
        ),
    ]


rule summarize_run:
    """Iteration, win rate and LC with intervals, the ranker's own estimate, length, minutes: table and figure."""
    input:
        judged=of_every_iteration("alpaca_eval.json"),
        estimated=of_every_iteration("ranker_estimate.json"),
        records=records_of_every_iteration,
    output:
        table=f"{ROOT}{{run}}summary.md",
        png=f"{ROOT}{{run}}figures/win_rate.png",
        svg=report(
            f"{ROOT}{{run}}figures/win_rate.svg",
            caption="captions/win_rate.rst",
            category="AlpacaEval",
            labels=labels("by iteration"),
        ),
        length_png=f"{ROOT}{{run}}figures/length.png",
        length_svg=report(
            f"{ROOT}{{run}}figures/length.svg",
            caption="captions/length.rst",
            category="AlpacaEval",
            labels=labels("over length"),
        ),
        table_record=record(f"{ROOT}{{run}}summary.md"),
        png_record=record(f"{ROOT}{{run}}figures/win_rate.png"),
        svg_record=record(f"{ROOT}{{run}}figures/win_rate.svg"),
        length_png_record=record(f"{ROOT}{{run}}figures/length.png"),
        length_svg_record=record(f"{ROOT}{{run}}figures/length.svg"),
    log:
        f"{LOGS}{{run}}summarize_run.log",
    benchmark:
        f"{BENCHMARKS}{{run}}summarize_run.tsv"
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        version=STAGES["tabulate"],
    message:
        "Summing up {wildcards.run}all iterations"
    shell:
        f"{PYTHON} {SRC}/reporting/summarize_run.py"
        " --alpaca-eval {input.judged:q} --ranker {input.estimated:q}"
        " --records {input.records:q} --output {output.table:q} --plot {output.png:q}"
        " --length-plot {output.length_png:q} 2>&1 | tee {log:q}"


def comparable_outputs(wildcards):
    """Answers of main's iterates, and of those of other runs that are there already and answer the same instructions alike."""
    same = [name for name, run in USABLE.items() if name and answers_as_main(run)]
    made = [
        path
        for run in same
        for t in range(1, USABLE[run]["iterations"] + 1)
        if os.path.exists(path := artifact(run, t, "alpaca_eval_outputs.json"))
    ]
    return [
        artifact("", t, "alpaca_eval_outputs.json") for t in range(MAIN["iterations"] + 1)
    ] + made


def compared_by(wildcards):
    """The preference model of training, or the judge; the embedded judge where that one is behind an API."""
    if wildcards.model == "ranker":
        return preference_model("")
    judge = MAIN["alpaca_eval"]["judge"]
    return judge if local_kind(judge) else "judge"


rule compare_policies:
    """Win rates of all iterates and runs against each other, by the ranker and by the judge that training did not see."""
    input:
        outputs=comparable_outputs,
        model=lambda wildcards: (
            preference_model_files("")
            if wildcards.model == "ranker"
            else model_files(compared_by(wildcards), None)
        ),
        ranker_base=lambda wildcards: (
            ranker_base("") if wildcards.model == "ranker" else EMBEDDED_POLICY
        ),
    output:
        csv=f"{ROOT}figures/pairwise_{{model}}.csv",
        png=f"{ROOT}figures/pairwise_{{model}}.png",
        svg=report(
            f"{ROOT}figures/pairwise_{{model}}.svg",
            caption="captions/pairwise.rst",
            category="AlpacaEval",
            labels=labels("against each other, by the {model}"),
        ),
        csv_record=record(f"{ROOT}figures/pairwise_{{model}}.csv"),
        png_record=record(f"{ROOT}figures/pairwise_{{model}}.png"),
        svg_record=record(f"{ROOT}figures/pairwise_{{model}}.svg"),
    log:
        f"{LOGS}compare_policies.{{model}}.log",
    benchmark:
        f"{BENCHMARKS}compare_policies.{{model}}.tsv"
    wildcard_constraints:
        model="ranker|judge",
    conda:
        "../envs/eval.yaml"
    threads: MODEL_THREADS
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=MODEL_GPUS,
    params:
        version=STAGES["tabulate"],
        model=compared_by,
    message:
        "Comparing all policies with each other by the {wildcards.model}"
    shell:
        f"{PYTHON} {SRC}/evaluation/compare_policies.py"
        " --outputs {input.outputs:q} --model {params.model:q}"
        " --ranker-base {input.ranker_base:q}"
        f" --device {DEVICE}"
        " --output {output.csv:q}"
        " --plot {output.png:q} 2>&1 | tee {log:q}"


def already_made(names):
    """Input function: what is there of all runs' iterations. A table shows what was run and asks for nothing more."""
    return lambda wildcards: [
        path
        for run in USABLE
        for t in range(USABLE[run]["iterations"] + 1)
        for name in names
        if os.path.exists(path := artifact(run, t, name))
    ]


rule paper_tables:
    """The tables of the papers, published beside measured, a dash where a run was not made."""
    input:
        published=expand(f"{PUBLISHED}/{{table}}.csv", table=["index", *PAPER_TABLES]),
        measured=already_made(
            [*(each.artifact for each in EVALUATIONS), "best_of_16/alpaca_eval.json"]
        ),
    output:
        tables=expand(
            f"{ROOT}tables/{{table}}.{{form}}", table=PAPER_TABLES, form=["csv", "md", "tex"]
        ),
        records=expand(
            record(f"{ROOT}tables/{{table}}.{{form}}"),
            table=PAPER_TABLES,
            form=["csv", "md", "tex"],
        ),
        all=f"{ROOT}tables/all.md",
        ours=f"{ROOT}tables/measured.md",
        page=report(
            f"{ROOT}tables/all.html",
            caption="captions/tables.rst",
            category="Tables",
            labels=labels("published and measured"),
        ),
        all_record=record(f"{ROOT}tables/all.md"),
        ours_record=record(f"{ROOT}tables/measured.md"),
        page_record=record(f"{ROOT}tables/all.html"),
    log:
        f"{LOGS}paper_tables.log",
    benchmark:
        f"{BENCHMARKS}paper_tables.tsv"
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        version=STAGES["tabulate"],
        base=lambda wildcards: (
            "SmolLM2-135M-Instruct"
            if MAIN["policy"]["model"] == "embedded"
            else MAIN["policy"]["model"]
        ),
    message:
        "Setting the papers' tables beside what was measured"
    shell:
        f"{PYTHON} {SRC}/reporting/make_tables.py"
        f" --published {shlex.quote(str(PUBLISHED))}"
        f" --results {ROOT}"
        " --base {params.base:q}"
        " --output {output.all:q} 2>&1 | tee {log:q}"
