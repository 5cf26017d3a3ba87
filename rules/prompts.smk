"""Requires: a prompt source, the evaluation instructions. Gives: iter{t}/prompts.parquet."""


def prompt_file(wildcards):
    """The file of prompts; nothing for a hub data set."""
    source = settings(wildcards)["prompts"]["source"].replace("{t}", wildcards.t)
    return source if Path(source).is_file() else []


def earlier_prompts(wildcards):
    """The prompts of earlier iterations, if each iteration has its own source.

    Portions of one source are always disjoint.
    """
    if "{t}" not in settings(wildcards)["prompts"]["source"]:
        return []
    return [sampled(wildcards, "prompts.parquet", t) for t in range(1, int(wildcards.t))]


def prompt_flags(wildcards):
    """The flags of the section `prompts`.

    `repeat` has a flag only if it is set. Otherwise prompts that were drawn before the key existed
    would be drawn again, see `pair_flags`.
    """
    chosen = settings(wildcards)["prompts"]
    return flags(chosen, skip=() if chosen["repeat"] else ("repeat",)) + CHATS


@functools.cache
def not_excluded(run):
    """The evaluations whose questions would be trained on, because HELD_OUT lacks them."""
    return [
        each.name for each in EVALUATIONS if each.name not in HELD_OUT and each.check(RUNS[run], "")
    ]


def questions(wildcards):
    """The questions of the evaluations, which must not be training prompts."""
    for name in not_excluded(run_of(wildcards)):
        fail(
            f"the evaluation {name} has questions, but does not exclude them from training; add"
            f' HELD_OUT["{name}"] = lambda wildcards: [<their file>] to its file in rules/'
        )
    files = [file for asked in HELD_OUT.values() for file in asked(wildcards)]
    return list(dict.fromkeys(files))


def parts(wildcards):
    """The number of disjoint parts into which the prompts are divided.

    If this number does not decide which prompts iteration t gets, it is t. So a run can be
    continued with a larger `iterations`.
    """
    run = settings(wildcards)
    if int(wildcards.t) > run["iterations"]:
        where = f"runs.{run_of(wildcards)}." if run_of(wildcards) else ""
        fail(
            f"iteration {wildcards.t} is asked for, but {where}iterations is {run['iterations']};"
            " raise it"
        )
    chosen = run["prompts"]
    is_fixed = chosen["per_iteration"] or chosen["repeat"] or "{t}" in chosen["source"]
    return wildcards.t if is_fixed else run["iterations"]


rule sample_prompts:
    """Draw one iteration's prompts, disjoint from other iterations' and from the evaluations'."""
    input:
        source=prompt_file,
        held_out=questions,
        policy=BASE_POLICY,
        earlier=earlier_prompts,
    output:
        prompts=at("prompts.parquet"),
        record=record(at("prompts.parquet")),
    log:
        f"{LOGS}{{run}}iter{{t}}/sample_prompts.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/sample_prompts.tsv"
    priority: 1  # if the hub does not have the prompts of a later iteration, the run fails early
    localrule: True  # it needs the network, which compute nodes may not have
    conda:
        "../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        version=STAGES["sample"],
        iterations=parts,
        room=lambda wildcards: settings(wildcards)["responses"]["max_new_tokens"],
        seed=lambda wildcards: settings(wildcards)["seeds"]["data"],
        options=prompt_flags,
        # The base was not trained with target rewards, so it is sampled without.
        highest_reward=lambda wildcards: highest_reward(wildcards) if wildcards.t != "1" else "",
    message:
        "Drawing the prompts of {wildcards.run}iteration {wildcards.t}"
    shell:
        f"{PYTHON} {SRC}/sample_prompts.py"
        " --iteration {wildcards.t}"
        " --iterations {params.iterations:q} --seed {params.seed:q} --held-out {input.held_out:q}"
        " --earlier {input.earlier:q} --policy {input.policy:q} --response-tokens {params.room:q}"
        " {params.options:q} {params.highest_reward} --output {output.prompts:q} 2>&1 | tee {log:q}"
