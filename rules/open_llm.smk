"""Requires: iter{t}/policy. Gives: iter{t}/open_llm.json."""

OPEN_LLM_BY_VLLM = MAIN["responses"]["engine"] == "vllm"
OPEN_LLM_ENVIRONMENT = ENGINE_ENVIRONMENT if OPEN_LLM_BY_VLLM else "../envs/eval.yaml"


def open_llm_engine(wildcards):
    """The flags of the engine that runs the policy: the one that generates responses."""
    run = settings(wildcards)["responses"]
    return flags({key: run[key] for key in ("engine", "tensor_parallel", "gpu_memory")})


rule evaluate_open_llm:
    """Run the six tasks of the Open LLM Leaderboard v1 with lm-eval."""
    input:
        policy=this_policy,
        data=lambda wildcards: files_of(settings(wildcards)["open_llm"]["data"]),
    output:
        result=at("open_llm.json"),
        record=record(at("open_llm.json")),
    log:
        f"{LOGS}{{run}}iter{{t}}/open_llm.log",
    benchmark:
        f"{BENCHMARKS}{{run}}iter{{t}}/open_llm.tsv"
    conda:
        OPEN_LLM_ENVIRONMENT
    threads: MODEL_THREADS
    resources:
        mem_mb=8000,
        runtime=480,
        gpu=ENGINE_GPUS if OPEN_LLM_BY_VLLM else MODEL_GPUS,
    params:
        version=STAGES["open_llm"],
        seed=lambda wildcards: settings(wildcards)["seeds"]["data"],
        options=section_flags("open_llm"),
        engine=open_llm_engine,
        attention=flags({"attention": MAIN["policy"]["attention"]}),
    message:
        "Open LLM tasks: {wildcards.run}iteration {wildcards.t}"
    shell:
        f"{PYTHON} {SRC}/evaluation/evaluate_open_llm.py"
        " --policy {input.policy:q}"
        " --seed {params.seed:q}"
        f" --device {DEVICE}"
        " {params.options:q} {params.engine:q} {params.attention:q}"
        " --output {output.result:q} 2>&1 | tee {log:q}"
