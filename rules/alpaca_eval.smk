"""Requires: iter{t}/policy, evaluation instructions, a judge. Gives: iter{t}/alpaca_eval.json and what it is made of."""

ANSWER_KEYS = ("limit", "temperature", "top_p", "max_new_tokens")
# Every policy answers with the same noise, so that they differ by their weights alone; the reference has its own,
# so that iter0 against it shows what noise does.
NOISE = {"alpaca_eval_outputs": "alpaca_eval", "reference_outputs": "alpaca_eval_reference"}


def answer_flags(wildcards):
    """How the evaluation instructions are answered."""
    run = settings(wildcards)
    chosen = {key: run["alpaca_eval"][key] for key in ANSWER_KEYS}
    engine = {key: run["responses"][key] for key in ("engine", "batch_size", "precision")}
    return flags(chosen | engine | {"attention": MAIN["policy"]["attention"]})


def reference_outputs(wildcards):
    """What the policy is compared with: main's answers of the base unless the run answers otherwise."""
    run = settings(wildcards)
    if run["alpaca_eval"]["reference"] != "base":
        return run["alpaca_eval"]["reference"]
    as_main = all(run["alpaca_eval"][key] == MAIN["alpaca_eval"][key] for key in (*ANSWER_KEYS, "instructions"))
    return f"{ROOT}{'' if as_main else wildcards.run}iter0/reference_outputs.json"


def judge_files(judge):
    """Files of an embedded judge and its base; nothing for one behind an API."""
    folder = adapter_folder(judge)
    return [EMBEDDED_POLICY, *(folder / name for name in ADAPTER_FILES)] if folder else []


def judge_flags(wildcards):
    """The judge and how its verdicts are summed up."""
    run = settings(wildcards)
    keys = ("judge", "judge_model", "judge_base_url", "difficulty", "bootstrap", "length_controlled_bootstrap")
    return flags({key: run["alpaca_eval"][key] for key in keys})


def ranker_flags(wildcards):
    """The same with the preference model that training saw in the judge's place."""
    run = settings(wildcards)
    return flags({"judge": run["preference"]["model"], "bootstrap": run["alpaca_eval"]["bootstrap"], "length_controlled_bootstrap": 0})


def decoding(wildcards):
    """Facts of decoding that the result keeps, as JSON."""
    import json

    return json.dumps({key: settings(wildcards)["alpaca_eval"][key] for key in ANSWER_KEYS[1:]})


def policy_name(wildcards):
    """What the policy is called: experiment, run, iteration."""
    return f"{MAIN['name'] or 'sppo'}/{wildcards.run}iter{wildcards.t}"


def generator_name(wildcards):
    """What it is called in outputs; alpaca-eval compares nothing if two generators have one name."""
    return policy_name(wildcards) + ("-reference" if wildcards.answers == "reference_outputs" else "")


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
    conda:
        "../envs/core.yaml"
    wildcard_constraints:
        answers="alpaca_eval_outputs|reference_outputs",
    threads: MODEL_THREADS
    resources:
        mem_mb=6000,
        runtime=120,
        gpu=MODEL_GPUS,
    params:
        version=STAGES["evaluate"],
        seed=lambda wildcards: settings(wildcards)["seeds"]["data"],
        noise=lambda wildcards: NOISE[wildcards.answers],
        generator=generator_name,
        options=answer_flags,
    message:
        "Answering the evaluation instructions: {wildcards.run}iteration {wildcards.t}, {wildcards.answers}"
    shell:
        "{PYTHON} src/answer_instructions.py --instructions {input.instructions:q} --policy {input.policy}"
        " --generator {params.generator} --noise {params.noise} --seed {params.seed} --device {MAIN[device]} {params.options:q}"
        " --output {output.outputs} 2>&1 | tee {log}"


rule alpaca_eval:
    """Win rate and length-controlled win rate against the reference, by alpaca-eval's own metrics."""
    input:
        outputs=at("alpaca_eval_outputs.json"),
        reference=reference_outputs,
        judge=lambda wildcards: judge_files(settings(wildcards)["alpaca_eval"]["judge"]),
    output:
        result=at("alpaca_eval.json"),
        annotations=at("alpaca_eval_annotations.json"),
        record=record(at("alpaca_eval.json")),
        annotations_record=record(at("alpaca_eval_annotations.json")),
    log:
        f"{LOGS}{{run}}iter{{t}}/alpaca_eval.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/alpaca_eval.tsv"
    conda:
        "../envs/eval.yaml"
    threads: MODEL_THREADS
    resources:
        mem_mb=4000,
        runtime=120,
        gpu=MODEL_GPUS,
    params:
        version=STAGES["evaluate"],
        seed=lambda wildcards: settings(wildcards)["seeds"]["data"],
        policy=policy_name,
        decoding=decoding,
        options=judge_flags,
    message:
        "Judging {wildcards.run}iteration {wildcards.t}"
    shell:
        "{PYTHON} src/evaluate_alpaca_eval.py --outputs {input.outputs} --reference {input.reference:q} --judge-base {EMBEDDED_POLICY}"
        " --policy {params.policy} --decoding {params.decoding:q} --seed {params.seed} --device {MAIN[device]} --threads {threads} {params.options:q}"
        " --annotations {output.annotations} --output {output.result} 2>&1 | tee {log}"


rule ranker_estimate:
    """The same win rates by the preference model that training saw: what it believes it gained."""
    input:
        outputs=at("alpaca_eval_outputs.json"),
        reference=reference_outputs,
        ranker=lambda wildcards: judge_files(settings(wildcards)["preference"]["model"]),
    output:
        result=at("ranker_estimate.json"),
        annotations=at("ranker_annotations.json"),
        record=record(at("ranker_estimate.json")),
        annotations_record=record(at("ranker_annotations.json")),
    log:
        f"{LOGS}{{run}}iter{{t}}/ranker_estimate.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/ranker_estimate.tsv"
    conda:
        "../envs/eval.yaml"
    threads: MODEL_THREADS
    resources:
        mem_mb=4000,
        runtime=120,
        gpu=MODEL_GPUS,
    params:
        version=STAGES["evaluate"],
        seed=lambda wildcards: settings(wildcards)["seeds"]["data"],
        policy=policy_name,
        decoding=decoding,
        options=ranker_flags,
    message:
        "Estimating by the ranker: {wildcards.run}iteration {wildcards.t}"
    shell:
        "{PYTHON} src/evaluate_alpaca_eval.py --outputs {input.outputs} --reference {input.reference:q} --judge-base {EMBEDDED_POLICY}"
        " --policy {params.policy} --decoding {params.decoding:q} --seed {params.seed} --device {MAIN[device]} --threads {threads} {params.options:q}"
        " --annotations {output.annotations} --output {output.result} 2>&1 | tee {log}"
