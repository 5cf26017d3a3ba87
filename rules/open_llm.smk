"""Requires: iter{t}/policy. Gives: iter{t}/open_llm.json."""


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
        "../envs/eval.yaml"
    threads: MODEL_THREADS
    resources:
        mem_mb=8000,
        runtime=480,
        gpu=MODEL_GPUS,
    params:
        version=STAGES["open_llm"],
        seed=lambda wildcards: settings(wildcards)["seeds"]["data"],
        options=section_flags("open_llm"),
        attention=flags({"attention": MAIN["policy"]["attention"]}),
    message:
        "Open LLM tasks: {wildcards.run}iteration {wildcards.t}"
    shell:
        f"{PYTHON} {SRC}/evaluation/evaluate_open_llm.py"
        " --policy {input.policy:q}"
        " --seed {params.seed:q}"
        f" --device {DEVICE}"
        " {params.options:q} {params.attention:q}"
        " --output {output.result:q} 2>&1 | tee {log:q}"
