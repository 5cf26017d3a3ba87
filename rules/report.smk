"""Requires: training logs, samples, evaluations. Gives: figures and tables for the report.

The files are figures/training.{png,svg} and response_browser.html of a run,
tables/evaluations.{csv,md,html}, tables/methods.{csv,md,tex,html} and figures/methods.{png,svg}.
`snakemake --report` shows them.
"""


def is_trained(run):
    """Whether a run trains policies."""
    return run["iterations"] > 0 and run["extrapolation"] is None


def is_browsable(run):
    """Whether the response browser can show a run."""
    return is_trained(run) and trains_on_one_pair(run["pairs"], run["replay"]["share"])


def trainings(wildcards):
    """The iterations 1 to T of the run; an error if it is not trained."""
    run = settings(wildcards)
    if not is_trained(run):
        fail(
            f"the run {run_of(wildcards) or 'main'} trains no policy, so there is nothing to show"
            " of its training; ask for its summary.md"
        )
    return range(1, run["iterations"] + 1)


def browsed(wildcards):
    """The iterations that the response browser shows; an error if it cannot show the run."""
    if is_trained(settings(wildcards)) and not is_browsable(settings(wildcards)):
        fail(
            "the response browser shows only runs that train on one pair of responses to each"
            f" prompt, which {run_of(wildcards) or 'main'} does not; see pairs.construction,"
            " pairs.even_lengths, pairs.target_reward and replay.share"
        )
    return trainings(wildcards)


rule plot_training:
    """Plot the loss, the log-ratios of winners and losers, and the accuracy of all iterations."""
    input:
        logs=lambda wildcards: [
            artifact(run_of(wildcards), t, "train_log.jsonl") for t in trainings(wildcards)
        ],
    output:
        png=f"{ROOT}{{run}}figures/training.png",
        svg=report(
            f"{ROOT}{{run}}figures/training.svg",
            caption="captions/training.rst",
            category="Training",
            labels=labels("curves"),
        ),
        png_record=record(f"{ROOT}{{run}}figures/training.png"),
        svg_record=record(f"{ROOT}{{run}}figures/training.svg"),
    log:
        f"{LOGS}{{run}}plot_training.log",
    benchmark:
        f"{BENCHMARKS}{{run}}plot_training.tsv"
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        version=STAGES["tabulate"],
    message:
        "Plotting {wildcards.run}training curves"
    shell:
        f"{PYTHON} {SRC}/reporting/plot_training.py"
        " --logs {input.logs:q} --plot {output.png:q}"
        " 2>&1 | tee {log:q}"


rule build_response_browser:
    """Make a page of all prompts, responses, matrices P and pairs, and all evaluation outputs."""
    input:
        template=shipped("src/sppo/reporting/response_browser.html"),
        instructions=lambda wildcards: settings(wildcards)["alpaca_eval"]["instructions"],
        prompts=lambda wildcards: [
            sampled(wildcards, "prompts.parquet", t) for t in browsed(wildcards)
        ],
        responses=lambda wildcards: [
            path for t in browsed(wildcards) for path in shards(wildcards, "responses", t)
        ],
        preferences=lambda wildcards: [
            path for t in browsed(wildcards) for path in shards(wildcards, "preferences", t)
        ],
        pairs=lambda wildcards: [
            artifact(run_of(wildcards), t, "pairs.parquet") for t in trainings(wildcards)
        ],
        answers=of_every_iteration("alpaca_eval_outputs.json"),
        annotations=of_every_iteration("alpaca_eval_annotations.json"),
    output:
        page=report(
            f"{ROOT}{{run}}response_browser.html",
            caption="captions/responses.rst",
            category="Responses",
            labels=labels("response browser"),
        ),
        record=record(f"{ROOT}{{run}}response_browser.html"),
    log:
        f"{LOGS}{{run}}response_browser.log",
    benchmark:
        f"{BENCHMARKS}{{run}}response_browser.tsv"
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        version=STAGES["tabulate"],
        options=pair_flags,
        replay=replay_flags,
    message:
        "Building {wildcards.run}response browser"
    shell:
        f"{PYTHON} {SRC}/reporting/build_response_browser.py"
        " --prompts {input.prompts:q}"
        " --responses {input.responses:q} --preferences {input.preferences:q}"
        " --pairs {input.pairs:q} --answers {input.answers:q} --annotations {input.annotations:q}"
        " --instructions {input.instructions:q} {params.options:q} {params.replay:q}"
        " --output {output.page:q} 2>&1 | tee {log:q}"


rule tabulate_evaluations:
    """Make a table of all evaluations, with one line for each iteration of each run."""
    input:
        files=already_made([*(each.artifact for each in EVALUATIONS), record("pairs.parquet")]),
    output:
        csv=f"{ROOT}tables/evaluations.csv",
        md=f"{ROOT}tables/evaluations.md",
        html=report(
            f"{ROOT}tables/evaluations.html",
            caption="captions/evaluations.rst",
            category="Tables",
            labels=labels("all evaluations"),
        ),
        csv_record=record(f"{ROOT}tables/evaluations.csv"),
        md_record=record(f"{ROOT}tables/evaluations.md"),
        html_record=record(f"{ROOT}tables/evaluations.html"),
    log:
        f"{LOGS}tabulate_evaluations.log",
    benchmark:
        f"{BENCHMARKS}tabulate_evaluations.tsv"
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        version=STAGES["tabulate"],
    message:
        "Making the table of all evaluations"
    shell:
        f"{PYTHON} {SRC}/reporting/tabulate_evaluations.py"
        f" --results {ROOT}"
        " --files {input.files:q}"
        " --output {output.md:q} 2>&1 | tee {log:q}"


SHARDS = range(max(run["responses"]["shards"] for run in USABLE.values()))
EARLIER = range(1, max(len(run["train"]["history"]) for run in USABLE.values()))
# The frozen policies that score pairs, see rules/training.smk.
FROZEN = ["current", "reference", "before_lookahead", *(f"earlier{number}" for number in EARLIER)]
COSTS = [
    *(
        f"{folder}/{shard}.parquet"
        for folder in (
            "responses",
            "preferences",
            "grades",
            *(f"logps/{frozen}" for frozen in FROZEN),
        )
        for shard in SHARDS
    ),
    "pairs.parquet",
    "policy",
    "lookahead",
]


rule tabulate_methods:
    """Make a table of the win rates and the cost of each iteration of each run."""
    input:
        files=already_made(["alpaca_eval.json", "ranker_estimate.json", *map(record, COSTS)]),
    output:
        md=f"{ROOT}tables/methods.md",
        tables=expand(f"{ROOT}tables/methods.{{form}}", form=["csv", "tex"]),
        page=report(
            f"{ROOT}tables/methods.html",
            caption="captions/methods.rst",
            category="Tables",
            labels=labels("methods"),
        ),
        png=f"{ROOT}figures/methods.png",
        svg=report(
            f"{ROOT}figures/methods.svg",
            caption="captions/methods.rst",
            category="AlpacaEval",
            labels=labels("methods"),
        ),
        md_record=record(f"{ROOT}tables/methods.md"),
        table_records=expand(record(f"{ROOT}tables/methods.{{form}}"), form=["csv", "tex"]),
        page_record=record(f"{ROOT}tables/methods.html"),
        png_record=record(f"{ROOT}figures/methods.png"),
        svg_record=record(f"{ROOT}figures/methods.svg"),
    log:
        f"{LOGS}tabulate_methods.log",
    benchmark:
        f"{BENCHMARKS}tabulate_methods.tsv"
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        version=STAGES["tabulate"],
    message:
        "Making the table of the methods"
    shell:
        f"{PYTHON} {SRC}/reporting/tabulate_methods.py"
        f" --results {ROOT}"
        " --files {input.files:q}"
        " --output {output.md:q} --plot {output.png:q} 2>&1 | tee {log:q}"
