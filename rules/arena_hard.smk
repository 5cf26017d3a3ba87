"""Requires: iter{t}/policy, questions, a judge. Gives: iter{t}/arena_hard.json.

It also gives the answers and judgments.
"""

ARENA_HARD_QUESTIONS = f"{MODELS}arena_hard/questions.jsonl"
ARENA_HARD_REFERENCE = f"{MODELS}arena_hard/reference_outputs.json"
# The base's answers as reference have their own noise, as in AlpacaEval.
ARENA_HARD_NOISE = {
    "arena_hard_outputs": "arena_hard",
    "arena_hard_reference_outputs": "arena_hard_reference",
}


def arena_hard_questions(wildcards):
    """The file of questions: the configured one, or the official one, which a rule fetches."""
    chosen = settings(wildcards)["arena_hard"]["instructions"]
    return ARENA_HARD_QUESTIONS if chosen == "official" else chosen


HELD_OUT["arena_hard"] = lambda wildcards: [arena_hard_questions(wildcards)]


def arena_hard_reference(wildcards):
    """The answers that the policy is compared with.

    The base's answers are the main run's, unless this run answers in another way.
    """
    chosen = settings(wildcards)["arena_hard"]
    if chosen["reference"] == "base":
        run = "" if chosen == MAIN["arena_hard"] else run_of(wildcards)
        return artifact(run, 0, "arena_hard_reference_outputs.json")
    return ARENA_HARD_REFERENCE if chosen["reference"] == "official" else chosen["reference"]


def arena_hard_generator(wildcards):
    """The policy's name in its answers."""
    is_reference = wildcards.arena_hard_answers == "arena_hard_reference_outputs"
    return policy_name(wildcards) + ("-reference" if is_reference else "")


def arena_hard_judge(wildcards):
    """The files of a judge that is a preference model, and of its base; none behind an API."""
    judge = settings(wildcards)["arena_hard"]["judge"]
    kind = local_kind(judge)
    if kind is None:
        return []
    return kind.files(judge) + ([EMBEDDED_POLICY] if kind.needs_base else [])


def arena_hard_judge_takes_cores(wildcards):
    """Whether the judge computes with PyTorch."""
    kind = local_kind(settings(wildcards)["arena_hard"]["judge"])
    return bool(kind and kind.uses_torch)


rule fetch_arena_hard:
    """Fetch Arena-Hard v2's 750 questions and the answers of its baselines."""
    output:
        questions=ARENA_HARD_QUESTIONS,
        reference=ARENA_HARD_REFERENCE,
        questions_record=record(ARENA_HARD_QUESTIONS),
        reference_record=record(ARENA_HARD_REFERENCE),
    log:
        f"{MODELS}logs/arena_hard.log",
    benchmark:
        f"{MODELS}benchmarks/arena_hard.tsv"
    localrule: True  # it needs the network, which compute nodes may not have
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        version=STAGES["arena_hard"],
    message:
        "Fetching Arena-Hard's questions and reference answers"
    shell:
        f"{PYTHON} {SRC}/tools/fetch_arena_hard.py"
        " --questions {output.questions:q} --reference {output.reference:q} 2>&1 | tee {log:q}"


rule answer_arena_hard:
    """Answer Arena-Hard's questions with one policy. The base also answers as reference."""
    input:
        questions=arena_hard_questions,
        policy=this_policy,
    output:
        outputs=at("{arena_hard_answers}.json"),
        record=record(at("{arena_hard_answers}.json")),
    log:
        f"{LOGS}{{run}}iter{{t}}/{{arena_hard_answers}}.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/{{arena_hard_answers}}.tsv"
    wildcard_constraints:
        arena_hard_answers="|".join(ARENA_HARD_NOISE),
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
        noise=lambda wildcards: ARENA_HARD_NOISE[wildcards.arena_hard_answers],
        generator=arena_hard_generator,
        options=answering_flags("arena_hard"),
        highest_reward=highest_reward,
    message:
        "Answering Arena-Hard: {wildcards.run}iteration {wildcards.t},"
        " {wildcards.arena_hard_answers}"
    shell:
        f"{PYTHON} {SRC}/evaluation/answer_instructions.py"
        " --instructions {input.questions:q}"
        " --policy {input.policy:q} --generator {params.generator:q} --noise {params.noise:q}"
        " --seed {params.seed:q}"
        f" --device {DEVICE}"
        " {params.options:q} {params.highest_reward}"
        " --output {output.outputs:q} 2>&1 | tee {log:q}"


rule evaluate_arena_hard:
    """Compare a policy's answers with the reference's, in both orders, also at equal style."""
    input:
        questions=arena_hard_questions,
        outputs=at("arena_hard_outputs.json"),
        reference=arena_hard_reference,
        judge=arena_hard_judge,
    output:
        result=at("arena_hard.json"),
        judgments=at("arena_hard_judgments.jsonl"),
        record=record(at("arena_hard.json")),
        judgments_record=record(at("arena_hard_judgments.jsonl")),
    log:
        f"{LOGS}{{run}}iter{{t}}/arena_hard.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/arena_hard.tsv"
    conda:
        "../envs/eval.yaml"
    threads: threads_if(arena_hard_judge_takes_cores)
    resources:
        mem_mb=4000,
        runtime=240,
        gpu=gpus_if(arena_hard_judge),
    params:
        version=STAGES["arena_hard"],
        seed=lambda wildcards: settings(wildcards)["seeds"]["data"],
        judge=lambda wildcards: flags(
            {
                key: settings(wildcards)["arena_hard"][key]
                for key in ("judge", "judge_model", "judge_base_url")
            }
        ),
    message:
        "Judging Arena-Hard: {wildcards.run}iteration {wildcards.t}"
    shell:
        f"{PYTHON} {SRC}/evaluation/evaluate_arena_hard.py"
        " --instructions {input.questions:q}"
        " --outputs {input.outputs:q} --reference {input.reference:q}"
        f" --judge-base {EMBEDDED_POLICY}"
        f" --device {DEVICE}"
        " --seed {params.seed:q} {params.judge:q}"
        " --judgments {output.judgments:q} --output {output.result:q} 2>&1 | tee {log:q}"
