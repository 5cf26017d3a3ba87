"""Requires: iter{t}/policy, instructions with constraints. Gives: iter{t}/ifeval.json."""

from sppo.evaluation import ifeval

IFEVAL_OFFICIAL = f"{MODELS}ifeval/ifeval.jsonl"


def ifeval_instructions(wildcards):
    """The file of instructions: the configured one, or the official one, which a rule fetches."""
    chosen = settings(wildcards)["ifeval"]["instructions"]
    return IFEVAL_OFFICIAL if chosen == "official" else chosen


HELD_OUT["ifeval"] = lambda wildcards: [ifeval_instructions(wildcards)]


def ifeval_answers(wildcards):
    """AlpacaEval's answers, if they are to the same instructions with the same decoding."""
    same = ifeval.uses_alpaca_eval_answers(settings(wildcards))
    name = "alpaca_eval_outputs.json" if same else "ifeval_outputs.json"
    return artifact(run_of(wildcards), wildcards.t, name)


rule fetch_ifeval:
    """Fetch IFEval's 541 official prompts."""
    output:
        instructions=IFEVAL_OFFICIAL,
        record=record(IFEVAL_OFFICIAL),
    log:
        f"{MODELS}logs/ifeval.log",
    benchmark:
        f"{MODELS}benchmarks/ifeval.tsv"
    localrule: True  # it needs the network, which compute nodes may not have
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        version=STAGES["ifeval"],
    message:
        "Fetching IFEval's prompts"
    shell:
        f"{PYTHON} {SRC}/tools/fetch_ifeval.py --output {{output.instructions:q}}"
        " 2>&1 | tee {log:q}"


rule answer_ifeval:
    """Answer IFEval's prompts with one policy, if AlpacaEval's answers cannot be used."""
    input:
        instructions=ifeval_instructions,
        policy=this_policy,
    output:
        outputs=at("ifeval_outputs.json"),
        record=record(at("ifeval_outputs.json")),
    log:
        f"{LOGS}{{run}}iter{{t}}/ifeval_outputs.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/ifeval_outputs.tsv"
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
        generator=policy_name,
        options=answering_flags("ifeval"),
        highest_reward=highest_reward,
    message:
        "Answering IFEval's prompts: {wildcards.run}iteration {wildcards.t}"
    shell:
        f"{PYTHON} {SRC}/evaluation/answer_instructions.py"
        " --instructions {input.instructions:q}"
        " --policy {input.policy:q} --generator {params.generator:q} --noise ifeval"
        " --seed {params.seed:q}"
        f" --device {DEVICE}"
        " {params.options:q} {params.highest_reward}"
        " --output {output.outputs:q} 2>&1 | tee {log:q}"


rule evaluate_ifeval:
    """Check which constraints the answers follow, with lm-eval."""
    input:
        instructions=ifeval_instructions,
        answers=ifeval_answers,
    output:
        result=at("ifeval.json"),
        record=record(at("ifeval.json")),
    log:
        f"{LOGS}{{run}}iter{{t}}/ifeval.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/ifeval.tsv"
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 20 * attempt,
    params:
        version=STAGES["ifeval"],
    message:
        "IFEval: {wildcards.run}iteration {wildcards.t}"
    shell:
        f"{PYTHON} {SRC}/evaluation/evaluate_ifeval.py"
        " --instructions {input.instructions:q} --answers {input.answers:q}"
        " --output {output.result:q} 2>&1 | tee {log:q}"
