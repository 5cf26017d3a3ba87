"""The version number of every stage.

Raise a stage's number when its output changes. The rules pass the number in `params`, so Snakemake
then runs the stage again. No other change of the code reruns a stage; `make stale` lists the
artifacts that older code made.
"""

STAGES = {
    "policy_source": 1,
    "preference_source": 1,
    "sample": 1,
    "generate": 1,
    "annotate": 2,
    "grade": 2,
    "select": 4,
    "reference": 3,
    "train": 3,
    "answer": 1,
    "judge": 3,
    "measure": 1,
    "distil": 1,
    "mt_bench": 1,
    "arena_hard": 1,
    "open_llm": 3,
    "ifeval": 1,
    "tabulate": 2,
    "theory": 2,
    "push": 2,
    "export": 1,
}
