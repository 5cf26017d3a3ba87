"""Requires: iter{t}/policy, evaluation instructions, a judge. Gives: iter{t}/alpaca_eval.json.

It also gives the outputs and annotations, and iter{t}/ranker_estimate.json.
"""

import json

# Every policy answers with the same random noise, so that policies differ only by their weights.
# The reference has its own noise, so that iter0 against it shows the effect of noise.
# Sample k of best-of-n has the same noise for every n. So every n uses the same samples.
NOISE = {
    "alpaca_eval_outputs": "alpaca_eval",
    "reference_outputs": "alpaca_eval_reference",
    "best_of_n_answers": "best_of_n",
}


HELD_OUT["alpaca_eval"] = lambda wildcards: [settings(wildcards)["alpaca_eval"]["instructions"]]


def reference_outputs(wildcards):
    """The outputs that the policy is compared with: the configured ones, or the base's answers.

    The base's answers are the main run's, unless this run answers in another way.
    """
    run = settings(wildcards)
    if run["alpaca_eval"]["reference"] != "base":
        return run["alpaca_eval"]["reference"]
    return artifact("" if answers_as_main(run) else run_of(wildcards), 0, "reference_outputs.json")


def compared_outputs(wildcards):
    """The outputs that this verdict compares the policy with."""
    if wildcards.verdict == "against_previous":
        before = int(wildcards.t) - 1
        run = run_of(wildcards) if before else base_of(wildcards)
        return artifact(run, before, "alpaca_eval_outputs.json")
    return reference_outputs(wildcards)


def answers_as_main(run):
    """Whether the run answers the same instructions in the same way as the main run."""
    return all(
        run["alpaca_eval"][key] == MAIN["alpaca_eval"][key]
        for key in (*ANSWER_KEYS, "instructions")
    )


def judge(wildcards):
    """The configured judge, or, for the estimate, the preference model of training."""
    if wildcards.verdict == "ranker_estimate":
        return preference_model(run_of(wildcards))
    return settings(wildcards)["alpaca_eval"]["judge"]


def judge_files(wildcards):
    """The files of an embedded judge and its base, or of PairRM; empty for a judge with an API."""
    if wildcards.verdict == "ranker_estimate":
        run = run_of(wildcards)
        files = preference_model_files(run)
        base = ranker_base(run)
    else:
        kind = local_kind(judge(wildcards))
        files = kind.files(judge(wildcards)) if kind else []
        base = EMBEDDED_POLICY if kind and kind.needs_base else None
    return [base, *files] if base else files


def judging_takes_cores(wildcards):
    """Whether the judge computes with PyTorch, or the length-controlled model is refitted."""
    if wildcards.verdict == "ranker_estimate":
        kind = preference_kind(run_of(wildcards))
    else:
        kind = local_kind(judge(wildcards))
    refits = settings(wildcards)["alpaca_eval"]["length_controlled_bootstrap"]
    return bool((kind and kind.uses_torch) or refits)


def difficulty_file(wildcards):
    """The file of instruction difficulties for the length-controlled metric, or None."""
    if wildcards.verdict == "alpaca_eval":
        return settings(wildcards)["alpaca_eval"]["difficulty"]
    return None


def judge_flags(wildcards):
    """The flags of the judge and its metrics.

    Only `alpaca_eval` has an interval of the length-controlled win rate.
    """
    chosen = settings(wildcards)["alpaca_eval"]
    keys = ["bootstrap"]
    options = {}
    if wildcards.verdict == "ranker_estimate":
        options = preference_options(run_of(wildcards))
    else:
        keys += ["judge_model", "judge_base_url", "both_orders", "judge_passes"]
    if wildcards.verdict == "alpaca_eval":
        keys += ["difficulty", "length_controlled_bootstrap"]
    metrics = {"length_controlled_bootstrap": 0} | {key: chosen[key] for key in keys}
    chosen = flags({"judge": judge(wildcards)} | metrics)
    return chosen + flags(options, skip=REQUEST_KEYS, prefix="judge_")


def judge_request_flags(wildcards, threads):
    """The flags that say how a server of the preference model is asked, for the estimate by it."""
    of_estimate = wildcards.verdict == "ranker_estimate"
    return requests_of(run_of(wildcards), prefix="judge_") if of_estimate else []


def decoding(wildcards):
    """The decoding settings for the result, as JSON."""
    return json.dumps({key: settings(wildcards)["alpaca_eval"][key] for key in ANSWER_KEYS[1:]})


def policy_name(wildcards):
    """The policy's name: experiment, run, iteration."""
    return f"{MAIN['name'] or 'sppo'}/{wildcards.run}iter{wildcards.t}"


def generator_name(wildcards):
    """The policy's name in outputs. alpaca-eval does not compare generators with the same name."""
    suffix = "-reference" if wildcards.answers == "reference_outputs" else ""
    return policy_name(wildcards) + suffix


rule fetch_alpaca_eval:
    """Fetch AlpacaEval's 805 instructions with GPT-4 turbo's outputs."""
    output:
        reference=OFFICIAL_OUTPUTS,
        record=record(OFFICIAL_OUTPUTS),
    log:
        f"{MODELS}logs/alpaca_eval.log",
    benchmark:
        f"{MODELS}benchmarks/alpaca_eval.tsv"
    localrule: True  # it needs the network, which compute nodes may not have
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        version=STAGES["answer"],
    message:
        "Fetching AlpacaEval's instructions and reference outputs"
    shell:
        f"{PYTHON} {SRC}/tools/fetch_alpaca_eval.py reference --output {{output.reference:q}}"
        " 2>&1 | tee {log:q}"


rule fetch_difficulties:
    """Fetch the difficulties of AlpacaEval's 805 instructions."""
    input:
        reference=OFFICIAL_OUTPUTS,
    output:
        difficulty=OFFICIAL_DIFFICULTIES,
        record=record(OFFICIAL_DIFFICULTIES),
    log:
        f"{MODELS}logs/difficulties.log",
    benchmark:
        f"{MODELS}benchmarks/difficulties.tsv"
    localrule: True  # it needs the network, which compute nodes may not have
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        version=STAGES["answer"],
    message:
        "Fetching the difficulties of AlpacaEval's instructions"
    shell:
        f"{PYTHON} {SRC}/tools/fetch_alpaca_eval.py difficulty"
        " --reference {input.reference:q} --output {output.difficulty:q} 2>&1 | tee {log:q}"


rule answer_instructions:
    """Answer the evaluation instructions with one policy. The base also answers as reference."""
    input:
        instructions=lambda wildcards: settings(wildcards)["alpaca_eval"]["instructions"],
        policy=this_policy,
    output:
        outputs=at("{answers}.json"),
        record=record(at("{answers}.json")),
    log:
        f"{LOGS}{{run}}iter{{t}}/{{answers}}.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/{{answers}}.tsv"
    wildcard_constraints:
        answers="alpaca_eval_outputs|reference_outputs",
    conda:
        ENGINE_ENVIRONMENT
    threads: MODEL_THREADS
    resources:
        mem_mb=6000,
        runtime=120,
        gpu=ENGINE_GPUS,
    params:
        version=STAGES["answer"],
        seed=lambda wildcards: settings(wildcards)["seeds"]["data"],
        noise=lambda wildcards: NOISE[wildcards.answers],
        generator=generator_name,
        options=answering_flags("alpaca_eval"),
        highest_reward=lambda wildcards: (
            "" if wildcards.answers == "reference_outputs" else highest_reward(wildcards)
        ),
    message:
        "Answering the evaluation instructions: {wildcards.run}iteration {wildcards.t},"
        " {wildcards.answers}"
    shell:
        f"{PYTHON} {SRC}/evaluation/answer_instructions.py"
        " --instructions {input.instructions:q}"
        " --policy {input.policy:q} --generator {params.generator:q} --noise {params.noise:q}"
        " --seed {params.seed:q}"
        f" --device {DEVICE}"
        " {params.options:q} {params.highest_reward}"
        " --output {output.outputs:q} 2>&1 | tee {log:q}"


rule judge_outputs:
    """Compute the win rate and the length-controlled win rate against the reference."""
    input:
        outputs=at("alpaca_eval_outputs.json"),
        reference=compared_outputs,
        judge=judge_files,
        difficulty=lambda wildcards: difficulty_file(wildcards) or [],
    output:
        result=at("{verdict}.json"),
        annotations=at("{verdict}_annotations.json"),
        record=record(at("{verdict}.json")),
        annotations_record=record(at("{verdict}_annotations.json")),
    log:
        f"{LOGS}{{run}}iter{{t}}/{{verdict}}.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/{{verdict}}.tsv"
    wildcard_constraints:
        verdict="alpaca_eval|against_previous|ranker_estimate",
    conda:
        "../envs/eval.yaml"
    threads: threads_if(judging_takes_cores)
    resources:
        mem_mb=4000,
        runtime=120,
        gpu=gpus_if(judge_files),
    params:
        version=STAGES["judge"],
        seed=lambda wildcards: settings(wildcards)["seeds"]["data"],
        policy=policy_name,
        decoding=decoding,
        options=judge_flags,
        requests=judge_request_flags,
    message:
        "Judging {wildcards.run}iteration {wildcards.t}: {wildcards.verdict}"
    shell:
        f"{PYTHON} {SRC}/evaluation/evaluate_alpaca_eval.py"
        " --outputs {input.outputs:q}"
        " --reference {input.reference:q}"
        f" --judge-base {EMBEDDED_POLICY}"
        " --policy {params.policy:q}"
        " --decoding {params.decoding:q} --seed {params.seed:q}"
        f" --device {DEVICE}"
        " --threads {threads} {params.options:q} {params.requests:q}"
        " --annotations {output.annotations:q}"
        " --output {output.result:q} 2>&1 | tee {log:q}"
