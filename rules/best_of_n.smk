"""Requires: iter{t}/policy, a preference model, a judge. Gives: win rates of best-of-n, by n.

The files are iter{t}/{choice}_of_{n}/alpaca_eval.json, iter{t}/best_of_n.csv, .png and .svg. choice
is best, or nash for a draw from the equilibrium of the game among the n answers.
"""


def best_of_n_flags(wildcards):
    """The flags that set how instructions are answered, with several answers to each."""
    answering = answering_flags("alpaca_eval")(wildcards)
    return [*answering, *flags(settings(wildcards)["best_of_n"], skip=("nash",))]


use rule answer_instructions as answer_instructions_n_times with:
    output:
        outputs=at("{answers}.json"),
        record=record(at("{answers}.json")),
    wildcard_constraints:
        answers="best_of_n_answers",
    params:
        version=STAGES["answer"],
        seed=lambda wildcards: settings(wildcards)["seeds"]["data"],
        noise=lambda wildcards: NOISE[wildcards.answers],
        generator=generator_name,
        options=best_of_n_flags,
        highest_reward=highest_reward,


def answers_to_pick_from(wildcards):
    """The file of several answers to each instruction; an error if there are fewer than n."""
    most = settings(wildcards)["best_of_n"]["samples"]
    if int(wildcards.n) > most:
        fail(
            f"{wildcards.n} answers to each instruction are asked for; raise best_of_n.samples,"
            f" which is {most}"
        )
    return at("best_of_n_answers.json").format(**wildcards)


rule pick_best_of_n:
    """Keep the best of the first n answers by the preference model, or draw from their game."""
    input:
        answers=answers_to_pick_from,
        model=lambda wildcards: preference_model_files(run_of(wildcards)),
        ranker_base=lambda wildcards: ranker_base(run_of(wildcards)),
    output:
        outputs=at("{choice}_of_{n}/alpaca_eval_outputs.json"),
        record=record(at("{choice}_of_{n}/alpaca_eval_outputs.json")),
    log:
        f"{LOGS}{{run}}iter{{t}}/{{choice}}_of_{{n}}/pick_best_of_n.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/{{choice}}_of_{{n}}/pick_best_of_n.tsv"
    wildcard_constraints:
        choice="best|nash",
        n=r"[1-9]\d*",
    conda:
        "../envs/core.yaml"
    threads: MODEL_THREADS
    resources:
        mem_mb=4000,
        runtime=120,
        gpu=MODEL_GPUS,
    params:
        version=STAGES["answer"],
        options=lambda wildcards: judging_flags(run_of(wildcards)),
        requests=request_flags,
        seed=lambda wildcards: settings(wildcards)["seeds"]["data"],
        generator=lambda wildcards: f"{policy_name(wildcards)}-{wildcards.choice}-of-{wildcards.n}",
    message:
        "Picking one of {wildcards.n} answers ({wildcards.choice}):"
        " {wildcards.run}iteration {wildcards.t}"
    shell:
        f"{PYTHON} {SRC}/evaluation/pick_best_of_n.py"
        " --answers {input.answers:q} --choice {wildcards.choice} --n {wildcards.n}"
        " --seed {params.seed:q}"
        " {params.options:q} {params.requests:q} --ranker-base {input.ranker_base:q}"
        " --generator {params.generator:q}"
        f" --device {DEVICE}"
        " --output {output.outputs:q}"
        " 2>&1 | tee {log:q}"


use rule judge_outputs as judge_best_of_n with:
    input:
        outputs=at("{choice}_of_{n}/alpaca_eval_outputs.json"),
        reference=reference_outputs,
        judge=judge_files,
        difficulty=lambda wildcards: difficulty_file(wildcards) or [],
    output:
        result=at("{choice}_of_{n}/{verdict}.json"),
        annotations=at("{choice}_of_{n}/{verdict}_annotations.json"),
        record=record(at("{choice}_of_{n}/{verdict}.json")),
        annotations_record=record(at("{choice}_of_{n}/{verdict}_annotations.json")),
    log:
        f"{LOGS}{{run}}iter{{t}}/{{choice}}_of_{{n}}/{{verdict}}.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/{{choice}}_of_{{n}}/{{verdict}}.tsv"
    params:
        version=STAGES["judge"],
        seed=lambda wildcards: settings(wildcards)["seeds"]["data"],
        policy=lambda wildcards: f"{policy_name(wildcards)}-{wildcards.choice}-of-{wildcards.n}",
        decoding=decoding,
        options=judge_flags,
        requests=judge_request_flags,
    message:
        "Judging the {wildcards.choice} of {wildcards.n}: {wildcards.run}iteration {wildcards.t},"
        " {wildcards.verdict}"


def choices(wildcards):
    """How the figure's answers are chosen."""
    return ("best", "nash") if settings(wildcards)["best_of_n"]["nash"] else ("best",)


def powers_of_two(wildcards):
    """1, 2, 4, ... up to the number of samples, and the number of samples."""
    most = settings(wildcards)["best_of_n"]["samples"]
    return sorted({2**i for i in range(most.bit_length())} | {most})


rule plot_best_of_n:
    """Plot win rate and length by n; every n uses the same samples."""
    input:
        lambda wildcards: [
            at(f"{choice}_of_{n}/alpaca_eval.json").format(**wildcards)
            for n in powers_of_two(wildcards)
            for choice in choices(wildcards)
        ],
    output:
        csv=at("best_of_n.csv"),
        png=at("best_of_n.png"),
        svg=report(
            at("best_of_n.svg"),
            caption="captions/best_of_n.rst",
            category="AlpacaEval",
            labels=labels("best of n, iteration {t}"),
        ),
        csv_record=record(at("best_of_n.csv")),
        png_record=record(at("best_of_n.png")),
        svg_record=record(at("best_of_n.svg")),
    log:
        f"{LOGS}{{run}}iter{{t}}/plot_best_of_n.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/plot_best_of_n.tsv"
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        version=STAGES["tabulate"],
    message:
        "Plotting best of n: {wildcards.run}iteration {wildcards.t}"
    shell:
        f"{PYTHON} {SRC}/reporting/plot_best_of_n.py"
        " --alpaca-eval {input:q} --output {output.csv:q}"
        " --plot {output.png:q} 2>&1 | tee {log:q}"
