"""Hugging Face model folders: finding, linking and checking them, without loading the model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sppo.core.artifacts import ROOT, check_link, parse_json
from sppo.core.errors import UserError
from sppo.policies.hub import HUB_FILES, hub_failure, hub_token

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Models that AutoModelForCausalLM loads but that cannot be policies, by config.model_type, and why.
UNSUPPORTED_ARCHITECTURES: dict[str, str] = {
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xlnet",
            "xmod",
        ),
        "it reads text in both directions",
    ),
    **dict.fromkeys(
        (
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "moshi",
            "musicgen",
            "musicgen_melody",
            "mvp",
            "pegasus",
            "plbart",
            "prophetnet",
            "trocr",
            "whisper",
        ),
        "it is the decoder of a model with an encoder",
    ),
    **dict.fromkeys(
        ("recurrent_gemma", "rwkv", "xlstm"),
        "padding before a prompt changes the state of its recurrent layers",
    ),
    "minimax": "transformers generates other tokens with its cache than without",
}
WEIGHTS_INDEX = "model.safetensors.index.json"
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    WEIGHTS_INDEX,
)


def fetch(source: str, revision: str | None, key: str = "policy.model") -> tuple[Path, str | None]:
    """The folder of the model `source`, and its hub commit (None for a local folder).

    An existing folder has priority over a hub id. `revision` is a revision on the hub; without a
    network, the hub's local cache is used. `key` is the configuration key that an error names.
    UserError if there is no such model.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve(), None
    if not HUB_ID.fullmatch(source) or source.count("/") != 1:
        raise UserError(
            f"model {source!r} is neither a folder nor a hub id such as org/model; correct {key}"
        )
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            source, revision=revision, allow_patterns=HUB_FILES, token=hub_token()
        )
    # The hub client raises many types. The cause of each is a name, the network or access rights.
    except Exception as error:
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"cannot get model {source}{at} from the hub {hub_failure(error)}, "
            f"or give a local folder; the folder {source} does not exist here either"
        ) from error
    return Path(snapshot), Path(snapshot).name


def link_files(folder: Path, target: Path) -> None:
    """Create the folder `target` with links to the files of a model's folder.

    Links within this checkout are relative, so that the checkout can be moved.
    """
    target.mkdir()
    target_path = target.resolve()
    files: set[Path] = set()
    for pattern in HUB_FILES:
        files.update(folder.glob(pattern))
    for file in sorted(files):
        source = file.resolve()
        inside = source.is_relative_to(ROOT) and target_path.is_relative_to(ROOT)
        (target / file.name).symlink_to(os.path.relpath(source, target_path) if inside else source)


def check_policy(folder: Path, made_here: bool = True) -> None:
    """UserError unless the folder has a supported config, complete weights and a tokenizer.

    A user's folder must have a chat template too.

    `made_here`: whether the workflow made the folder and can make it again, or a user gave it. This
    decides which remedy an error names.
    """
    remedy = "save the model with save_pretrained, as safetensors"
    if made_here:
        remedy = "delete the folder and make it again"
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"policy folder {folder} does not exist; correct the path or make it")
    for file in sorted(folder.iterdir()):
        check_link(file, remedy)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"policy folder {folder} has no config.json; give a Hugging Face model folder"
        )
    contents = {}
    for name in JSON_FILES:
        if (folder / name).is_file():
            contents[name] = _read_object(folder / name, remedy)
    _check_config(folder, contents["config.json"])
    _check_weight_files(folder, contents.get(WEIGHTS_INDEX), remedy)
    tokenizer_files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in tokenizer_files):
        raise UserError(
            f"policy folder {folder} has no tokenizer; copy the tokenizer files of its base model "
            "into it"
        )
    in_settings = contents.get("tokenizer_config.json", {}).get("chat_template")
    if not made_here and not in_settings and not any(folder.glob("*chat_template*")):
        raise no_chat_template(folder)


def no_chat_template(folder: Path) -> UserError:
    """The error for a policy that cannot be prompted."""
    return UserError(
        f"the tokenizer of {folder} has no chat template; use an instruction-tuned model, or add "
        "chat_template.jinja to the model folder"
    )


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    """UserError if the weights are quantised or the architecture is unsupported."""
    if quantised := config.get("quantization_config"):
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"the weights of {folder} are quantised ({kind}), and quantised weights "
            "cannot be trained; give the model from which they were made"
        )
    architecture = config.get("model_type")
    if architecture in UNSUPPORTED_ARCHITECTURES:
        raise UserError(
            f"policy folder {folder} has the architecture {architecture}, which is unsupported: "
            f"{UNSUPPORTED_ARCHITECTURES[architecture]}; choose a model of another architecture"
        )


def _check_weight_files(folder: Path, index: dict[str, Any] | None, remedy: str) -> None:
    """UserError unless all weight files exist and are complete; `index` names several files."""
    names = ["model.safetensors"]
    if index is not None:
        if not isinstance(index.get("weight_map"), dict):
            raise UserError(f"{folder / WEIGHTS_INDEX} has no weight_map; {remedy}")
        names = sorted(set(map(str, index["weight_map"].values())))
    for name in names:
        weights = folder / name
        if not weights.is_file():
            raise UserError(f"policy folder {folder} has no weights ({name} is missing); {remedy}")
        if safetensors_header(weights) is None:
            raise UserError(f"{weights} is cut off or is not a safetensors file; {remedy}")


def _read_object(file: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file; UserError if the file cannot be read or holds something else."""
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); correct its permissions") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object; {remedy}")
    return content


def safetensors_header(weights: Path) -> dict[str, Any] | None:
    """The descriptions of the tensors in the file's header, by tensor name.

    None if the file is cut off or is not a safetensors file.
    """
    size = weights.stat().st_size
    with weights.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size:
            return None
        try:
            header = parse_json(stream.read(length))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
            return header if size == 8 + length + end else None
        except (ValueError, TypeError, LookupError, AttributeError):
            return None
