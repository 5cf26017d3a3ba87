"""Requires: iter{t}/responses/, a preference model. Gives: iter{t}/pairs.parquet.

It also gives iter{t}/preferences/{shard}.parquet, and iter0/preference_model if the model is
fetched.
"""


def preference_kind(run):
    """The kind of a run's preference model, which states what the model needs and reads."""
    return kind_of(run_settings(run)["preference"])


def preference_model(run):
    """A run's preference model as programs expect it: its name, or the folder that a rule makes.

    A run shares the main run's folder if it has the same model.
    """
    chosen = run_settings(run)["preference"]
    of_main = run_settings("")["preference"]
    if not preference_kind(run).is_prepared:
        return chosen["model"]
    keys = ("model", "revision", "backend", "kind")
    is_same = all(chosen[key] == of_main[key] for key in keys)
    return artifact("" if is_same else run, 0, "preference_model")


def preference_model_files(run):
    """The files of that model. If one changes, responses are compared again."""
    template = run_settings(run)["preference"]["prompt_template"]
    return preference_kind(run).files(preference_model(run)) + ([template] if template else [])


def ranker_base(run):
    """The base model of a run's preference model; empty if it has none."""
    return EMBEDDED_POLICY if preference_kind(run).needs_base else []


def comparing_uses_torch(wildcards):
    """Whether the run's preference model computes with PyTorch."""
    return preference_kind(run_of(wildcards)).uses_torch


def preference_options(run):
    """The keys of the section `preference` that the kind of a run's model reads, with values."""
    chosen = run_settings(run)["preference"]
    return {key: chosen[key] for key in preference_kind(run).options}


# The keys that cannot change a result. Snakemake does not run a job again if only a parameter has
# changed whose function takes `threads`, so these functions do.
REQUEST_KEYS = running_keys("preference")


def request_flags(wildcards, threads):
    """The flags that say how a server of the run's preference model is asked."""
    return requests_of(run_of(wildcards))


def requests_of(run, prefix=""):
    """`request_flags` of a run."""
    options = preference_options(run)
    return flags({key: options[key] for key in REQUEST_KEYS if key in options}, prefix=prefix)


def judging_flags(run):
    """The flags of a run's preference model for programs that let it judge answers."""
    return flags({"model": preference_model(run)} | preference_options(run), skip=REQUEST_KEYS)


def comparison_flags(wildcards):
    """The flags of the preference model, the prompts that it reads, and the options of its kind."""
    run = run_of(wildcards)
    chosen = settings(wildcards)["preference"]
    options = {"source": chosen["source"]} | preference_options(run)
    if preference_kind(run).is_prepared:
        options["backend"] = chosen["backend"]
    options["kind"] = chosen["kind"]
    return flags({"model": preference_model(run)} | options, skip=REQUEST_KEYS) + CHATS


def preference_environment(wildcards):
    """The conda environment of the preference model's kind.

    requirements.txt has the packages of `core` and `eval`, but not those of other environments.
    """
    environment = preference_kind(run_of(wildcards)).environment
    if environment not in ("core", "eval") and not IN_CONDA:
        fail(
            f"config: preference.backend is {environment}, which needs its own environment; "
            "run with --use-conda, or set it to transformers"
        )
    return f"../envs/{environment}.yaml"


rule preference_model:
    """Link the files of a preference model from a local folder, or from the hub at a revision."""
    input:
        lambda wildcards: hub_files(settings(wildcards)["preference"]["model"]),
    output:
        model=directory(at("preference_model", t=0)),
        record=record(at("preference_model", t=0)),
    log:
        f"{LOGS}{{run}}preference_model.log",
    benchmark:
        f"{BENCHMARKS}{{run}}preference_model.tsv"
    priority: 1
    localrule: True  # it needs the network, which compute nodes may not have
    conda:
        "../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        version=STAGES["preference_source"],
        options=lambda wildcards: flags(
            {
                key: settings(wildcards)["preference"][key]
                for key in ("model", "revision", "backend", "kind")
            }
        ),
    message:
        "Preparing the preference model in {output.model}"
    shell:
        f"{PYTHON} {SRC}/tools/prepare_preference_model.py"
        " {params.options:q} --output {output.model:q}"
        " 2>&1 | tee {log:q}"


rule annotate_preferences:
    """Compute all K x K logits of each prompt with the preference model."""
    input:
        prompts=at("prompts.parquet"),
        responses=at("responses/{shard}.parquet"),
        policy=BASE_POLICY,
        ranker_base=lambda wildcards: ranker_base(run_of(wildcards)),
        model=lambda wildcards: preference_model_files(run_of(wildcards)),
    output:
        preferences=at("preferences/{shard}.parquet"),
        record=record(at("preferences/{shard}.parquet")),
    log:
        f"{LOGS}{{run}}iter{{t}}/annotate_preferences.{{shard}}.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/annotate_preferences.{{shard}}.tsv"
    conda:
        preference_environment
    threads: threads_if(comparing_uses_torch)
    resources:
        mem_mb=8000,
        runtime=240,
        gpu=gpus_if(comparing_uses_torch),
    params:
        version=STAGES["annotate"],
        options=comparison_flags,
        requests=request_flags,
    message:
        "Comparing responses of {wildcards.run}iteration {wildcards.t}, shard {wildcards.shard}"
    shell:
        f"{PYTHON} {SRC}/annotate_preferences.py"
        " --prompts {input.prompts:q}"
        " --responses {input.responses:q} --policy {input.policy:q}"
        " --ranker-base {input.ranker_base:q}"
        f" --device {DEVICE}"
        " {params.options:q} {params.requests:q}"
        " --output {output.preferences:q} 2>&1 | tee {log:q}"


IMPLICIT = [name for name, run in USABLE.items() if run["preference"]["implicit"]]


rule annotate_implicitly:
    """Compute all K x K logits of each prompt from the implicit reward of pi_t."""
    input:
        prompts=at("prompts.parquet"),
        responses=at("responses/{shard}.parquet"),
        policy=current_policy,
        before=lambda wildcards: policy(run_of(wildcards), int(wildcards.t) - 2),
    output:
        preferences=at("preferences/{shard}.parquet"),
        record=record(at("preferences/{shard}.parquet")),
    log:
        f"{LOGS}{{run}}iter{{t}}/annotate_implicitly.{{shard}}.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/annotate_implicitly.{{shard}}.tsv"
    wildcard_constraints:
        run=any_of(IMPLICIT),
        t=r"(?!1/)\d+",
    conda:
        "../envs/core.yaml"
    threads: MODEL_THREADS
    resources:
        mem_mb=6000,
        runtime=120,
        gpu=MODEL_GPUS,
    params:
        version=STAGES["annotate"],
        beta=lambda wildcards: of_iteration(settings(wildcards)["train"], int(wildcards.t) - 1)[
            "beta"
        ],
        # A lambda, because scoring_flags is defined in a file that is read later.
        options=lambda wildcards: scoring_flags(wildcards),
        attention=lambda wildcards: flags({"attention": MAIN["policy"]["attention"]}),
    message:
        "Comparing responses of {wildcards.run}iteration {wildcards.t}, shard {wildcards.shard},"
        " by the policy's implicit reward"
    shell:
        f"{PYTHON} {SRC}/other_methods/annotate_implicitly.py"
        " --prompts {input.prompts:q}"
        " --responses {input.responses:q} --policy {input.policy:q} --before {input.before:q}"
        " --beta {params.beta:q}"
        f" --device {DEVICE}"
        " {params.attention:q} {params.options:q}"
        " --output {output.preferences:q} 2>&1 | tee {log:q}"


ruleorder: annotate_implicitly > annotate_preferences


def previous_pairs(wildcards):
    """An earlier iteration's pairs, some of which are trained on again; empty without replay."""
    t = int(wildcards.t)
    replay = settings(wildcards)["replay"]
    if not replay["share"] or t == 1:
        return []
    earlier = 1 if replay["iteration"] == "first" else t - 1
    return artifact(run_of(wildcards), earlier, "pairs.parquet")


def replay_flags(wildcards):
    """The flags that set how many of an earlier iteration's pairs are trained on again."""
    return flags(settings(wildcards)["replay"], skip=("iteration",), prefix="replay_")


def pair_flags(wildcards):
    """The flags of the section `pairs`, and the seeds of permuted labels and of random losers.

    Annotated labels are the program's default and have no flag. A flag would change the parameters
    of pairs that were made before the key existed, and Snakemake would make them again.
    """
    run = settings(wildcards)
    pairs, seed = dict(run["pairs"]), run["seeds"]["data"]
    if pairs["labels"] == "annotated":
        del pairs["labels"]
    else:
        pairs["label_seed"] = seed
    if pairs["construction"] == "best_vs_random":
        pairs["loser_seed"] = seed
    return flags(pairs)


rule build_pairs:
    """Compute P-hat of every response, and choose winner and loser of every prompt."""
    input:
        prompts=lambda wildcards: sampled(wildcards, "prompts.parquet"),
        responses=lambda wildcards: shards(wildcards, "responses"),
        preferences=lambda wildcards: preference_shards(wildcards),
        grades=lambda wildcards: grade_files(wildcards),
        previous=previous_pairs,
        gold=lambda wildcards: settings(wildcards)["pairs"]["gold"] or [],
        policy=lambda wildcards: (
            current_policy(wildcards)
            if settings(wildcards)["pairs"]["gold"]
            or settings(wildcards)["pairs"]["target_reward"]
            else []
        ),
    output:
        pairs=at("pairs.parquet"),
        record=record(at("pairs.parquet")),
    log:
        f"{LOGS}{{run}}iter{{t}}/build_pairs.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/build_pairs.tsv"
    conda:
        "../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        version=STAGES["select"],
        options=pair_flags,
        replay=replay_flags,
        more=lambda wildcards, input: flags(
            {
                "policy": input.policy or None,
                "previous": input.previous or None,
                "replay_seed": settings(wildcards)["seeds"]["data"],
            }
        )
        + CHATS,
    message:
        "Building the pairs of {wildcards.run}iteration {wildcards.t}"
    shell:
        f"{PYTHON} {SRC}/build_pairs.py"
        " --prompts {input.prompts:q} --responses {input.responses:q}"
        " --preferences {input.preferences:q} --grades {input.grades:q} {params.options:q}"
        " {params.replay:q} {params.more:q} --output {output.pairs:q} 2>&1 | tee {log:q}"
