"""Requires: the evaluations of a run's iterations. Gives: summaries, comparisons and tables.

The files are summary.md and figures/{win_rate,length}.{png,svg} of a run;
figures/pairwise_{ranker,judge}.{csv,png,svg}; tables/*.{csv,md,tex}, tables/all.{md,html} and
tables/measured.md, which compare the papers' figures with the measured ones.
"""

import csv
from types import SimpleNamespace

PUBLISHED = shipped("config/published")
with open(PUBLISHED / "index.csv", encoding="utf-8", newline="") as stream:
    PAPER_TABLES = [line["table"] for line in csv.DictReader(stream)]


def iterations(wildcards):
    """The iterations 0 to T of the run."""
    return range(settings(wildcards)["iterations"] + 1)


def base_of(wildcards, evaluation="alpaca_eval"):
    """The run whose iter0 evaluates the base: this run if it evaluates differently, else main."""
    run = settings(wildcards)
    name = run_of(wildcards)
    sections = {"alpaca_eval", "ifeval", evaluation} & run.keys()
    same_sections = all(run[key] == MAIN[key] for key in sections)
    same_prompt = run["pairs"]["target_reward"] == MAIN["pairs"]["target_reward"]
    same_model = preference_model(name) == preference_model("")
    as_main = same_sections and same_prompt and same_model
    return "" if as_main else name


def of_every_iteration(name):
    """Input function: one artifact in each iteration of the run."""
    return lambda wildcards: [
        artifact(run_of(wildcards) if t else base_of(wildcards), t, name)
        for t in iterations(wildcards)
    ]


def summarized(wildcards):
    """The evaluations that the run's summary shows, as entries of the registry."""
    chosen = settings(wildcards)["summary"]["evaluations"]
    return [each for each in EVALUATIONS if each.name in chosen]


def evaluations_of_base(wildcards):
    """The summary's evaluations of the base, which another run may have made."""
    return [
        artifact(base_of(wildcards, each.name), 0, each.artifact)
        for each in summarized(wildcards)
        if each.first_iteration == 0
    ]


def runs_beside(wildcards):
    """The run of the summary, and the runs that it shows beside it.

    A run that is evaluated in another way, or against other answers, is left out.
    """
    name = run_of(wildcards)
    run = settings(wildcards)
    own_reference = run["alpaca_eval"]["reference"] == "base" and not answers_as_main(run)
    others = [] if own_reference else run["summary"]["beside"]
    return [
        name,
        *(
            other
            for other in others
            if other != name and run_settings(other)["alpaca_eval"] == run["alpaca_eval"]
        ),
    ]


def policies_of_runs(wildcards):
    """Run and iteration of each trained policy of the summary.

    A run beside it is shown up to the last iteration of the summary's own run.
    """
    last = settings(wildcards)["iterations"]
    return [
        (run, t)
        for run in runs_beside(wildcards)
        for t in range(1, min(last, run_settings(run)["iterations"]) + 1)
    ]


def evaluations_of_runs(wildcards):
    """The summary's evaluations of these policies."""
    return [
        artifact(run, t, each.artifact)
        for run, t in policies_of_runs(wildcards)
        for each in summarized(wildcards)
    ]


def train_logs_of_runs(wildcards):
    """The training logs of these policies; none if one of the runs is not trained."""
    if any(run_settings(run)["extrapolation"] is not None for run in runs_beside(wildcards)):
        return []
    return [artifact(run, t, "train_log.jsonl") for run, t in policies_of_runs(wildcards)]


def records_of_every_iteration(wildcards):
    """Records whose seconds add up to an iteration's minutes."""
    run = run_of(wildcards)
    made = [
        artifact(run, t, name)
        for t in iterations(wildcards)
        for name in ("alpaca_eval_outputs.json", "alpaca_eval.json")
        if t or base_of(wildcards) == run
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
        of_iteration_t = SimpleNamespace(run=wildcards.run, t=str(t))
        made += [artifact(run, t, "pairs.parquet"), *trained_in(of_iteration_t)]
    return [record(path) for path in made]


def summary_files(run):
    """The files of a run's summary."""
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
    """Make a run's table and figures: its evaluations, log-ratios and minutes."""
    input:
        base=evaluations_of_base,
        evaluations=evaluations_of_runs,
        logs=train_logs_of_runs,
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
        run=lambda wildcards: run_of(wildcards),
    message:
        "Summarizing {wildcards.run}all iterations"
    shell:
        f"{PYTHON} {SRC}/reporting/summarize_run.py"
        " --run={params.run:q}"
        f" --results {ROOT}"
        " --base {input.base:q} --evaluations {input.evaluations:q} --train-logs {input.logs:q}"
        " --records {input.records:q} --output {output.table:q} --plot {output.png:q}"
        " --length-plot {output.length_png:q} 2>&1 | tee {log:q}"


def comparable_outputs(wildcards):
    """The outputs of the main run's policies, and those of other runs that exist already.

    Only runs that answer the same instructions in the same way as the main run are included.
    """
    files = [artifact("", t, "alpaca_eval_outputs.json") for t in range(MAIN["iterations"] + 1)]
    for name, run in USABLE.items():
        if name and answers_as_main(run):
            of_run = [
                artifact(name, t, "alpaca_eval_outputs.json")
                for t in range(1, run["iterations"] + 1)
            ]
            files += [path for path in of_run if os.path.exists(path)]
    return files


def compared_by(wildcards):
    """The flags of the preference model of training, or of the judge.

    The embedded judge replaces a judge with AlpacaEval's own prompt.
    """
    if wildcards.model == "ranker":
        return judging_flags("")
    address = MAIN["alpaca_eval"]["judge_base_url"]
    return flags({"model": comparing_judge(), "base_url": address})


def comparing_judge():
    """The judge, or the embedded judge if the judge is no preference model."""
    judge = MAIN["alpaca_eval"]["judge"]
    return judge if local_kind(judge) else "judge"


rule compare_policies:
    """Compute the win rates of all policies against each other, by the ranker or by the judge."""
    input:
        outputs=comparable_outputs,
        model=lambda wildcards: (
            preference_model_files("")
            if wildcards.model == "ranker"
            else model_files(comparing_judge(), None)
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
        options=compared_by,
        requests=lambda wildcards, threads: requests_of("") if wildcards.model == "ranker" else [],
    message:
        "Comparing all policies with each other by the {wildcards.model}"
    shell:
        f"{PYTHON} {SRC}/evaluation/compare_policies.py"
        " --outputs {input.outputs:q} {params.options:q} {params.requests:q}"
        " --ranker-base {input.ranker_base:q}"
        f" --device {DEVICE}"
        " --output {output.csv:q}"
        " --plot {output.png:q} 2>&1 | tee {log:q}"


def already_made(names):
    """Input function: the artifacts of all runs and iterations that exist.

    A table shows what was run and does not start other jobs.
    """
    return lambda wildcards: [
        path
        for run in USABLE
        for t in range(USABLE[run]["iterations"] + 1)
        for name in names
        if os.path.exists(path := artifact(run, t, name))
    ]


rule paper_tables:
    """Make the papers' tables with published and measured figures; a dash if a run was not made."""
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
        "Comparing the papers' tables with the measured figures"
    shell:
        f"{PYTHON} {SRC}/reporting/make_tables.py"
        f" --published {shlex.quote(str(PUBLISHED))}"
        f" --results {ROOT}"
        " --base {params.base:q}"
        " --output {output.all:q} 2>&1 | tee {log:q}"
