"""Requires: iter{t}/policy, evaluation instructions, a judge. Gives: iter{t}/alpaca_eval.json and what it is made of."""

import json

ANSWER_KEYS = ("limit", "temperature", "top_p", "max_new_tokens")
# Every policy answers with the same noise, so that they differ by their weights alone; the reference has its own,
# so that iter0 against it shows what noise does.
# Sample k of best-of-n has the same noise whatever n is, so that every n takes the first of the same samples.
NOISE = {
    "alpaca_eval_outputs": "alpaca_eval",
    "reference_outputs": "alpaca_eval_reference",
    "best_of_n_answers": "best_of_n",
}


def answer_flags(wildcards):
    """How the evaluation instructions are answered."""
    run = settings(wildcards)
    chosen = {key: run["alpaca_eval"][key] for key in ANSWER_KEYS}
    engine = {key: run["responses"][key] for key in ENGINE_KEYS}
    return flags(chosen | engine) + RUNNING


def reference_outputs(wildcards):
    """What the policy is compared with: main's answers of the base unless the run answers otherwise."""
    run = settings(wildcards)
    if run["alpaca_eval"]["reference"] != "base":
        return run["alpaca_eval"]["reference"]
    return artifact("" if answers_as_main(run) else run_of(wildcards), 0, "reference_outputs.json")


def answers_as_main(run):
    """Whether the run answers the same instructions in the same way, so that answers can be compared."""
    return all(
        run["alpaca_eval"][key] == MAIN["alpaca_eval"][key]
        for key in (*ANSWER_KEYS, "instructions")
    )


def judge(wildcards):
    """Who judges: the configured judge, or, for the estimate, the preference model that training saw."""
    run = settings(wildcards)
    return (
        run["alpaca_eval"]["judge"]
        if wildcards.verdict == "alpaca_eval"
        else preference_model(run_of(wildcards))
    )


def judge_files(wildcards):
    """Files of an embedded judge and its base, or PairRM's; nothing for a judge behind an API."""
    if wildcards.verdict == "ranker_estimate":
        run = run_of(wildcards)
        files, base = preference_model_files(run), ranker_base(run)
    else:
        kind = local_kind(judge(wildcards))
        files = kind.files(judge(wildcards)) if kind else []
        base = EMBEDDED_POLICY if kind and kind.needs_base else None
    return [base, *files] if base else files


def difficulty_file(wildcards):
    """Instruction difficulties, where the length-controlled metric takes them."""
    return (
        settings(wildcards)["alpaca_eval"]["difficulty"]
        if wildcards.verdict == "alpaca_eval"
        else None
    )


def judge_flags(wildcards):
    """The judge and how its verdicts are summed up. What the ranker believes it gained needs no interval of LC."""
    chosen = settings(wildcards)["alpaca_eval"]
    keys = (
        "judge_model",
        "judge_base_url",
        "difficulty",
        "bootstrap",
        "length_controlled_bootstrap",
    )
    rest = (
        {key: chosen[key] for key in keys}
        if wildcards.verdict == "alpaca_eval"
        else {"bootstrap": chosen["bootstrap"], "length_controlled_bootstrap": 0}
    )
    return flags({"judge": judge(wildcards)} | rest)


def decoding(wildcards):
    """Facts of decoding that the result keeps, as JSON."""
    return json.dumps({key: settings(wildcards)["alpaca_eval"][key] for key in ANSWER_KEYS[1:]})


def policy_name(wildcards):
    """What the policy is called: experiment, run, iteration."""
    return f"{MAIN['name'] or 'sppo'}/{wildcards.run}iter{wildcards.t}"


def generator_name(wildcards):
    """What it is called in outputs; alpaca-eval compares nothing if two generators have one name."""
    return policy_name(wildcards) + (
        "-reference" if wildcards.answers == "reference_outputs" else ""
    )


rule fetch_alpaca_eval:
    """AlpacaEval's 805 instructions with GPT-4 turbo's outputs, and their difficulties, for `official`."""
    output:
        reference=OFFICIAL_OUTPUTS,
        difficulty=OFFICIAL_DIFFICULTIES,
        reference_record=record(OFFICIAL_OUTPUTS),
        difficulty_record=record(OFFICIAL_DIFFICULTIES),
    log:
        f"{MODELS}logs/alpaca_eval.log",
    benchmark:
        f"{MODELS}benchmarks/alpaca_eval.tsv"
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        version=STAGES["answer"],
    message:
        "Fetching AlpacaEval's instructions and reference outputs from the hub"
    shell:
        f"{PYTHON} {SRC}/tools/fetch_alpaca_eval.py"
        " --reference {output.reference:q}"
        " --difficulty {output.difficulty:q} 2>&1 | tee {log:q}"


rule answer_instructions:
    """Answer the held-out instructions with one policy; for the base also with a second seed, the reference."""
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
        options=answer_flags,
        best_grade=lambda wildcards: highest_reward(wildcards, wildcards.t),
    message:
        "Answering the evaluation instructions: {wildcards.run}iteration {wildcards.t}, {wildcards.answers}"
    shell:
        f"{PYTHON} {SRC}/evaluation/answer_instructions.py"
        " --instructions {input.instructions:q}"
        " --policy {input.policy:q} --generator {params.generator:q} --noise {params.noise:q}"
        " --seed {params.seed:q}"
        f" --device {DEVICE}"
        " {params.options:q} {params.best_grade}"
        " --output {output.outputs:q} 2>&1 | tee {log:q}"


rule judge_outputs:
    """Win rate and length-controlled win rate against the reference, by alpaca-eval's own metrics."""
    input:
        outputs=at("alpaca_eval_outputs.json"),
        reference=reference_outputs,
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
        verdict="alpaca_eval|ranker_estimate",
    conda:
        "../envs/eval.yaml"
    threads: MODEL_THREADS
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
        " --threads {threads} {params.options:q} --annotations {output.annotations:q}"
        " --output {output.result:q} 2>&1 | tee {log:q}"
