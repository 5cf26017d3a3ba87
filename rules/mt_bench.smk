"""Requires: iter{t}/policy, questions in FastChat's format, a judge. Gives: iter{t}/mt_bench.json.

It also gives the answers and judgments.
"""

from sppo.evaluation import mt_bench

MT_BENCH_NOISE = {
    "mt_bench_answers": "mt_bench",
    "mt_bench_reference_answers": "mt_bench_reference",
}


def mt_bench_folder(wildcards):
    """The folder of questions, judge prompts and reference answers."""
    data = settings(wildcards)["mt_bench"]["data"]
    return MODELS + mt_bench.FETCHED[data] if data in mt_bench.FETCHED else data


def mt_bench_questions(wildcards):
    """The file of questions, or the folder that a rule fetches."""
    folder = mt_bench_folder(wildcards)
    is_fetched = settings(wildcards)["mt_bench"]["data"] in mt_bench.FETCHED
    return [folder if is_fetched else f"{folder}/question.jsonl"]


HELD_OUT["mt_bench"] = mt_bench_questions


def mt_bench_data(wildcards):
    """The input of a job that reads that folder: a rule's output, or the user's files."""
    folder = mt_bench_folder(wildcards)
    is_fetched = settings(wildcards)["mt_bench"]["data"] in mt_bench.FETCHED
    return folder if is_fetched else files_of(folder)


def mt_bench_flags(wildcards):
    """The flags that set how the questions are answered."""
    run = settings(wildcards)
    engine = {key: run["responses"][key] for key in ENGINE_KEYS}
    return flags(engine | {"max_new_tokens": run["mt_bench"]["max_new_tokens"]}) + RUNNING


def mt_bench_judge(wildcards):
    """The inputs of an embedded judge; empty for a judge behind an API.

    They are the answers of the base policy, the judge's base model, and its adapter.
    """
    chosen = settings(wildcards)["mt_bench"]
    kind = local_kind(chosen["judge"])
    if kind is None:
        return {}
    run = "" if chosen == MAIN["mt_bench"] else run_of(wildcards)
    return {
        "reference": artifact(run, 0, "mt_bench_reference_answers.jsonl"),
        "base": EMBEDDED_POLICY if kind.needs_base else [],
        "adapter": kind.files(chosen["judge"]),
    }


rule fetch_mt_bench:
    """Fetch FastChat's 80 questions, judge prompts and reference answers."""
    output:
        data=directory(f"{MODELS}{{questions}}"),
        record=record(f"{MODELS}{{questions}}"),
    log:
        f"{MODELS}logs/{{questions}}.log",
    benchmark:
        f"{MODELS}benchmarks/{{questions}}.tsv"
    wildcard_constraints:
        questions="|".join(mt_bench.FETCHED.values()),
    localrule: True  # it needs the network, which compute nodes may not have
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        version=STAGES["mt_bench"],
        references=lambda wildcards: (
            "published" if wildcards.questions == mt_bench.FETCHED["fastchat"] else "corrected"
        ),
    message:
        "Fetching MT-Bench's questions"
    shell:
        f"{PYTHON} {SRC}/tools/fetch_mt_bench.py"
        " --references {params.references:q} --output {output.data:q} 2>&1 | tee {log:q}"


rule answer_mt_bench:
    """Answer the questions with one policy; the base also answers as the reference."""
    input:
        data=mt_bench_data,
        policy=this_policy,
    output:
        answers=at("{mt_bench_answers}.jsonl"),
        record=record(at("{mt_bench_answers}.jsonl")),
    log:
        f"{LOGS}{{run}}iter{{t}}/{{mt_bench_answers}}.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/{{mt_bench_answers}}.tsv"
    wildcard_constraints:
        mt_bench_answers="mt_bench_answers|mt_bench_reference_answers",
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
        data=mt_bench_folder,
        noise=lambda wildcards: MT_BENCH_NOISE[wildcards.mt_bench_answers],
        name=policy_name,
        options=mt_bench_flags,
        highest_reward=highest_reward,
    message:
        "Answering MT-Bench: {wildcards.run}iteration {wildcards.t}, {wildcards.mt_bench_answers}"
    shell:
        f"{PYTHON} {SRC}/evaluation/answer_mt_bench.py"
        " --data {params.data:q} --policy {input.policy:q}"
        " --model-id {params.name:q} --noise {params.noise:q} --seed {params.seed:q}"
        f" --device {DEVICE}"
        " {params.options:q} {params.highest_reward}"
        " --output {output.answers:q} 2>&1 | tee {log:q}"


rule evaluate_mt_bench:
    """Compute scores by turn and category, from a judge's grades or comparisons with the base."""
    input:
        unpack(mt_bench_judge),
        answers=at("mt_bench_answers.jsonl"),
        data=mt_bench_data,
    output:
        result=at("mt_bench.json"),
        judgments=at("mt_bench_judgments.jsonl"),
        record=record(at("mt_bench.json")),
        judgments_record=record(at("mt_bench_judgments.jsonl")),
    log:
        f"{LOGS}{{run}}iter{{t}}/mt_bench.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/mt_bench.tsv"
    conda:
        "../envs/eval.yaml"
    threads: MODEL_THREADS
    resources:
        mem_mb=4000,
        runtime=240,
        gpu=gpus_if(mt_bench_judge),
    params:
        version=STAGES["mt_bench"],
        data=mt_bench_folder,
        judge=lambda wildcards: flags(
            {
                key: settings(wildcards)["mt_bench"][key]
                for key in ("judge", "judge_model", "judge_base_url")
            }
        ),
        embedded=lambda wildcards, input: (
            flags({"reference": input.reference, "judge_base": input.base or None})
            if "reference" in input.keys()
            else []
        ),
    message:
        "Judging MT-Bench: {wildcards.run}iteration {wildcards.t}"
    shell:
        f"{PYTHON} {SRC}/evaluation/evaluate_mt_bench.py"
        " --data {params.data:q} --answers {input.answers:q}"
        " {params.embedded:q} {params.judge:q}"
        f" --device {DEVICE}"
        " --judgments {output.judgments:q} --output {output.result:q} 2>&1 | tee {log:q}"
