"""Requires: iter{t}/pairs.parquet, iter{t-1}/policy. Gives: iter{t}/policy.

It also gives iter{t}/logps/{frozen}/{shard}.parquet and iter{t}/train_log.jsonl. `frozen` is the
policy that scores the pairs: current (the one that training starts from, pi_t), reference (the
method's other policy), earlier1, earlier2, ... (pi_t-1, pi_t-2, ...) or before_lookahead. A run
with `train.lookahead` also has iter{t}/lookahead, an auxiliary policy.
"""


def reference_iteration(wildcards):
    """The iteration of the reference policy of log-ratios.

    The reference is replaced by the newest policy every `reference_every` iterations.
    """
    every = settings(wildcards)["train"]["reference_every"]
    if every is None:
        return 0
    before = int(wildcards.t) - 1
    return before - before % every


def scoring_flags(wildcards):
    """The flags of scoring. They match the trainer's, because log-ratios must start at 0."""
    train = settings(wildcards)["train"]
    named = {
        "micro_batch_size": train["micro_batch_size"],
        "micro_batch_tokens": train["micro_batch_tokens"],
        "precision": train["precision"],
        "lora_rank": train["lora_rank"] or None,
    }
    return flags(named) + (["--rounded"] if train["parallel"] in FSDP else [])


LOOKAHEAD = [name for name, run in USABLE.items() if run["train"]["lookahead"]]


def lookahead_policy(run, t):
    """The auxiliary policy of a run with `train.lookahead` after iteration t; the base for 0."""
    return artifact(run, t, "lookahead") if t else BASE_POLICY


def first_policy(wildcards):
    """The policy that the training of this iteration starts from: pi_t, or the auxiliary policy."""
    if settings(wildcards)["train"]["lookahead"]:
        return lookahead_policy(run_of(wildcards), int(wildcards.t))
    return current_policy(wildcards)


def before_lookahead(wildcards):
    """The auxiliary policy that this iteration's one is trained from."""
    return lookahead_policy(run_of(wildcards), int(wildcards.t) - 1)


def frozen_policy(wildcards):
    """The policy that scores the pairs; the head of this file has its names."""
    run, before = run_of(wildcards), int(wildcards.t) - 1
    if wildcards.frozen == "current":
        return first_policy(wildcards)
    if wildcards.frozen == "before_lookahead":
        return before_lookahead(wildcards)
    if wildcards.frozen == "reference":
        return policy(run, reference_iteration(wildcards))
    return policy(run, before - int(wildcards.frozen.removeprefix("earlier")))


def logps(frozen):
    """Input function: the log-probabilities of the pairs under a frozen policy."""
    return lambda wildcards: scored(run_of(wildcards), wildcards.t, frozen)


def scored(run, t, frozen):
    """The files of log-probabilities of a run's pairs, one for each shard."""
    shards = range(run_settings(run)["responses"]["shards"])
    return [artifact(run, t, f"logps/{frozen}/{shard}.parquet") for shard in shards]


def opponents(wildcards):
    """The weights of the opponents pi_t, pi_t-1, ... that exist; [1] for pi_t alone."""
    train = settings(wildcards)["train"]
    return train["history"][: int(wildcards.t)] if has_opponents(train["loss"]) else [1]


def other_references(wildcards):
    """The log-probabilities under the reference and under earlier opponents, as named inputs.

    Either is left out if it is pi_t.
    """
    run, t = run_of(wildcards), wildcards.t
    inputs = {}
    if reference_iteration(wildcards) != int(t) - 1:
        inputs["reference"] = scored(run, t, "reference")
    earlier = [
        path
        for number in range(1, len(opponents(wildcards)))
        for path in scored(run, t, f"earlier{number}")
    ]
    return inputs | ({"earlier": earlier} if earlier else {})


def trained_in(wildcards):
    """Everything that an iteration's training makes, so that its cost can be summed up."""
    run, t = run_of(wildcards), wildcards.t
    made = [*scored(run, t, "current"), artifact(run, t, "policy")]
    for files in other_references(wildcards).values():
        made += files
    if settings(wildcards)["train"]["lookahead"]:
        made += [*scored(run, t, "before_lookahead"), artifact(run, t, "lookahead")]
    return made


def reference_flags(wildcards, input):
    """The flags that hand these inputs to the program."""
    named = {key: input[key] for key in ("reference", "earlier") if key in input.keys()}
    if "earlier" in named:
        named["history"] = opponents(wildcards)
    return flags(named)


rule score_reference:
    """Compute the log-probabilities of a shard's pairs under pi_t, or another frozen policy."""
    input:
        pairs=at("pairs.parquet"),
        policy=frozen_policy,
    output:
        logps=at("logps/{frozen}/{shard}.parquet"),
        record=record(at("logps/{frozen}/{shard}.parquet")),
    log:
        f"{LOGS}{{run}}iter{{t}}/score_reference.{{frozen}}.{{shard}}.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/score_reference.{{frozen}}.{{shard}}.tsv"
    wildcard_constraints:
        frozen=r"current|reference|before_lookahead|earlier\d+",
    conda:
        "../envs/core.yaml"
    threads: MODEL_THREADS
    resources:
        mem_mb=6000,
        runtime=120,
        gpu=MODEL_GPUS,
    params:
        version=STAGES["reference"],
        shards=lambda wildcards: settings(wildcards)["responses"]["shards"],
        options=scoring_flags,
        attention=lambda wildcards: flags({"attention": MAIN["policy"]["attention"]}),
    message:
        "Scoring the pairs of {wildcards.run}iteration {wildcards.t}"
        " under the {wildcards.frozen} policy, shard {wildcards.shard}"
    shell:
        f"{PYTHON} {SRC}/score_reference.py"
        " --pairs {input.pairs:q} --policy {input.policy:q}"
        " --shard {wildcards.shard} --shards {params.shards:q}"
        f" --device {DEVICE}"
        " {params.attention:q} {params.options:q} --output {output.logps:q}"
        " 2>&1 | tee {log:q}"


EXTRAPOLATED = [name for name, run in USABLE.items() if run["extrapolation"] is not None]


rule extrapolate_policy:
    """Extrapolate the main run's policy along the line from the base, without training (ExPO)."""
    input:
        base=BASE_POLICY,
        aligned=artifact("", "{t}", "policy"),
    output:
        policy=directory(at("policy")),
        record=record(at("policy")),
    log:
        f"{LOGS}{{run}}iter{{t}}/extrapolate_policy.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/extrapolate_policy.tsv"
    wildcard_constraints:
        run=any_of(EXTRAPOLATED),
    conda:
        "../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=7000,
        runtime=60,
    params:
        version=STAGES["train"],
        alpha=lambda wildcards: settings(wildcards)["extrapolation"],
    message:
        "Extrapolating the policy of {wildcards.run}iteration {wildcards.t}"
    shell:
        f"{PYTHON} {SRC}/other_methods/extrapolate_policy.py"
        " --base {input.base:q} --aligned {input.aligned:q}"
        " --alpha {params.alpha:q} --output {output.policy:q} 2>&1 | tee {log:q}"


def training_flags(wildcards):
    """The flags of the section `train`, without the parameters that its loss does not read.

    So a key that is added for one loss does not make the policies of others again.
    """
    train = of_iteration(settings(wildcards)["train"], int(wildcards.t))
    skipped = (*unread_keys(train["loss"]), *running_keys("train"))
    return flags(train, skip=("reference_every", "history", "lookahead", *skipped))


def running_flags(wildcards, threads):
    """The flags of training that cannot change a policy, see `REQUEST_KEYS`."""
    train = settings(wildcards)["train"]
    return flags({key: train[key] for key in running_keys("train")})


def on_each_node(wildcards):
    """The prefix that starts a command on all nodes of its job; empty for one node.

    On each node the program starts its own processes.
    """
    nodes = settings(wildcards)["train"]["nodes"]
    if nodes == 1:
        return ""
    # srun would bind a task without --cpus-per-task to one core. If a node fails, the others would
    # wait for it.
    return (
        f"srun --overlap --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1"
        " --cpu-bind=none --kill-on-bad-exit=1 "
    )


rule train_policy:
    """Train the next policy: regress the log-ratios of winners and losers onto their targets."""
    input:
        unpack(other_references),
        pairs=at("pairs.parquet"),
        current=logps("current"),
        policy=first_policy,
    output:
        policy=directory(at("policy")),
        policy_record=record(at("policy")),
        log=at("train_log.jsonl"),
        log_record=record(at("train_log.jsonl")),
    log:
        f"{LOGS}{{run}}iter{{t}}/train_policy.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/train_policy.tsv"
    wildcard_constraints:
        run=any_of(name for name in RUNS if name not in EXTRAPOLATED),
    conda:
        "../envs/core.yaml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=7000,
        runtime=720,
        gpu=TRAINING_GPUS,
    params:
        version=STAGES["train"],
        on_each_node=on_each_node,
        seed=lambda wildcards: settings(wildcards)["seeds"]["train"],
        options=training_flags,
        running=running_flags,
        reference=reference_flags,
        attention=lambda wildcards: flags({"attention": MAIN["policy"]["attention"]}),
    message:
        "Training the policy of {wildcards.run}iteration {wildcards.t}"
    shell:
        "{params.on_each_node}"
        f"{PYTHON} {SRC}/train_policy.py"
        " --pairs {input.pairs:q} --current {input.current:q}"
        " {params.reference:q} --policy {input.policy:q} --seed {params.seed:q}"
        f" --device {DEVICE}"
        " {params.attention:q} {params.options:q} {params.running:q}"
        " --output {output.policy:q} --log {output.log:q} 2>&1 | tee {log:q}"


use rule train_policy as train_lookahead with:
    input:
        pairs=at("pairs.parquet"),
        current=logps("before_lookahead"),
        policy=before_lookahead,
    output:
        policy=(
            directory(at("lookahead"))
            if MAIN["keep_policies"]
            else temp(directory(at("lookahead")))
        ),
        policy_record=record(at("lookahead")),
        log=at("lookahead_log.jsonl"),
        log_record=record(at("lookahead_log.jsonl")),
    log:
        f"{LOGS}{{run}}iter{{t}}/train_lookahead.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/train_lookahead.tsv"
    wildcard_constraints:
        run=any_of(LOOKAHEAD),
    message:
        "Training the auxiliary policy of {wildcards.run}iteration {wildcards.t}"


# Without keep_policies, all policies but the last are deleted once the next iteration and the
# evaluations have used them. A run with fewer iterations than the main run keeps its policies,
# because the wildcards of a rule cannot give each run its own last iteration.
LAST = MAIN["iterations"]
if not MAIN["keep_policies"] and LAST > 1:

    use rule train_policy as train_dropped_policy with:
        output:
            policy=temp(directory(at("policy"))),
            policy_record=record(at("policy")),
            log=at("train_log.jsonl"),
            log_record=record(at("train_log.jsonl")),
        wildcard_constraints:
            run=any_of(name for name, run in USABLE.items() if run["iterations"] >= LAST),
            t="|".join(map(str, range(1, LAST))),

    ruleorder: extrapolate_policy > train_dropped_policy > train_policy
