"""Upload a policy to the Hugging Face hub, with its evaluation figures, and its training pairs.

Reads   a policy folder, its alpaca_eval.json, the data set of the pairs that it was trained on
Writes  two repositories on the hub (private if they are new): the policy's, and <name>-preferences
        for the data set; and a file that names them and their commits

The token is the environment variable HF_TOKEN. The workflow pushes only if the configuration's
push_to_hub names a repository.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import recorded, write_json
from sppo.core.errors import UserError, run
from sppo.evaluation.results import read_evaluation
from sppo.policies.hub import check_push, hub_failure
from sppo.reporting.cards import table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument(
        "--evaluation", type=Path, required=True, help="the policy's alpaca_eval.json"
    )
    parser.add_argument("--dataset", type=Path, nargs="?", help="folder from export_pairs.py")
    parser.add_argument("--repository", required=True, help="such as me/my-policy")
    parser.add_argument("--output", type=Path, required=True, help="record of the upload, .json")
    args = parser.parse_args()

    check_push()
    from huggingface_hub import HfApi

    api = HfApi(token=os.environ["HF_TOKEN"])
    inputs = [args.policy, args.evaluation, *([args.dataset] if args.dataset else [])]
    written = {"repository": args.repository, "policy": str(args.policy)}
    of_pairs = f"{args.repository}-preferences"
    with recorded("push", args.output, inputs, vars(args)):
        text = card(args.policy, read_evaluation(args.evaluation))
        try:
            api.create_repo(args.repository, private=True, exist_ok=True)
            api.upload_folder(
                repo_id=args.repository,
                folder_path=args.policy,
                ignore_patterns=["README.md"],
                commit_message="Policy",
            )
            done = api.upload_file(
                repo_id=args.repository,
                path_or_fileobj=text.encode(),
                path_in_repo="README.md",
                commit_message="Model card",
            )
            written["commit"] = done.oid
            if args.dataset:
                api.create_repo(of_pairs, repo_type="dataset", private=True, exist_ok=True)
                pairs = api.upload_folder(
                    repo_id=of_pairs,
                    repo_type="dataset",
                    folder_path=args.dataset,
                    commit_message="Preference pairs",
                )
                written |= {"dataset_repository": of_pairs, "dataset_commit": pairs.oid}
        # The hub client raises many types of errors. Name, network or access is the cause of each.
        except Exception as error:
            raise UserError(
                f"cannot push {args.policy} to {args.repository} {hub_failure(error)}"
            ) from error
        write_json(args.output, written)
    print(f"Pushed {args.policy} to {args.repository}")
    if args.dataset:
        print(f"Pushed {args.dataset} to {of_pairs}")


def card(policy: Path, evaluation: dict[str, Any]) -> str:
    """The policy's card with a table of its evaluation added."""
    keys = (
        "win_rate",
        "length_controlled_winrate",
        "avg_length",
        "n_total",
        "judge",
        "reference",
        "length_controlled_model",
    )
    doubts = [key for key in ("n_empty", "length_controlled_warning") if evaluation.get(key)]
    facts = {key: evaluation[key] for key in (*keys, *doubts)}
    text = (policy / "README.md").read_text(encoding="utf-8", errors="replace")
    return text + "\n## AlpacaEval, per cent\n\n" + table(facts)


if __name__ == "__main__":
    run(main)
