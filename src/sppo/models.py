"""Policies as Hugging Face folders: finding, checking and loading them; chat templates; devices."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.artifacts import read_json
from sppo.errors import UserError
from sppo.gpus import cores_of_job, take_gpus
from sppo.hub import hub_failure, hub_token

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]


def pick_device(device: str) -> str:
    """`cpu` or `cuda` for auto, cpu or gpu. Asking for a GPU that is not there is a UserError, and so is leaving one idle that Slurm gave."""
    import torch

    given = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS")
    if device == "auto" and given and not torch.cuda.is_available():
        raise UserError(f"Slurm gave this job a GPU (number {given}), but PyTorch sees none; install a CUDA build of torch, or set device: cpu")
    if device == "gpu" and not torch.cuda.is_available():
        raise UserError("device is gpu, but PyTorch sees no GPU here; set device: cpu, or install a CUDA build of torch")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def compute_dtype(precision: str, device: str) -> torch.dtype:
    """The type that `precision` (auto, bfloat16, float32) means on this device.

    auto is bfloat16 where the hardware multiplies in it, for where it is emulated it is slower than float32.
    """
    import torch

    if precision == "auto":
        if device == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = _cpu_has_bfloat16()
        precision = "bfloat16" if native else "float32"
    return getattr(torch, precision)


def weights_dtype(lora_rank: int, dtype: torch.dtype) -> torch.dtype:
    """The type that weights are held in while trained or scored: float32, as updates are small; with LoRA, which updates
    none of them, the type of the computation."""
    import torch

    return dtype if lora_rank else torch.float32


def _cpu_has_bfloat16() -> bool:
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & words)


def fetch(source: str, revision: str | None, key: str = "policy.model") -> tuple[Path, str | None]:
    """Folder of the model that `source` names, and its hub commit (None for a local folder).

    A folder that exists wins over a hub id. The hub is asked for `revision`; offline, its local cache is. `key` is the
    one of the configuration that an error names.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve(), None
    if not HUB_ID.fullmatch(source) or source.count("/") != 1:
        raise UserError(f"model {source!r} is neither a folder nor a hub id such as org/model; correct {key}")
    from huggingface_hub import snapshot_download
    try:
        snapshot = Path(snapshot_download(source, revision=revision, allow_patterns=HUB_FILES, token=hub_token()))
    except Exception as error:  # the hub client raises many types; each is a matter of name, network or access
        at = f" at revision {revision}" if revision else ""
        raise UserError(f"cannot get model {source}{at} from the hub {hub_failure(error)}, or give a local folder") from error
    return snapshot, snapshot.name


def link_files(folder: Path, target: Path) -> None:
    """Make `target` a folder of links to the files of a model's folder."""
    target.mkdir()
    for file in sorted({file for pattern in HUB_FILES for file in folder.glob(pattern)}):
        (target / file.name).symlink_to(file.resolve())


def check_policy(folder: Path, made_here: bool = True) -> None:
    """A policy folder has a config, whole weights and a tokenizer; else a UserError says what it lacks.

    `made_here` tells one of the workflow's own, which can be made again, from a user's.
    """
    remedy = "delete the folder and make it again" if made_here else "save the model with save_pretrained, as safetensors"
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"policy folder {folder} does not exist; correct the path or make it")
    if not (folder / "config.json").is_file():
        raise UserError(f"policy folder {folder} has no config.json; it is not a Hugging Face model folder")
    read_json(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        weights = folder / name
        if not weights.is_file():
            raise UserError(f"policy folder {folder} has no weights ({name} is missing); {remedy}")
        if safetensors_header(weights) is None:
            raise UserError(f"{weights} is cut off or is not a safetensors file; {remedy}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise UserError(f"policy folder {folder} has no tokenizer; copy the tokenizer files of its base model into it")


def safetensors_header(weights: Path) -> dict[str, Any] | None:
    """Tensors by name, as the file's header describes them; None if the file is cut off or of another form."""
    size = weights.stat().st_size
    with weights.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size:
            return None
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return None
    header.pop("__metadata__", None)
    return header if size == 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0) else None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The policy's tokenizer. One without a chat template is a UserError: there is no way to prompt it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {folder} has no chat template; use an instruction-tuned model, or add "
                        "chat_template.jinja to the model folder")
    return tokenizer


def load_policy(folder: Path, dtype: torch.dtype, device: str | None, attention: str | None = None) -> PreTrainedModel:
    """The policy in evaluation mode, with every dropout at 0 so that it is the same function when trained.

    Without a device it stays where it was read, for who divides it over processes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    check_policy(folder)
    config = AutoConfig.from_pretrained(folder)
    for name in vars(config):
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    more: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, **more)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return (model.to(device) if device else model).eval()


def context_length(folder: Path) -> int | None:
    """Most tokens that the model takes, prompt and response together; None if its config does not say."""
    config = read_json(Path(folder) / "config.json")
    return config.get("max_position_embeddings") or config.get("n_positions")


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of the chat up to where the assistant begins; nothing is put before what the template gives."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the chat template, for records."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def stop_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response: the generation config's, else the tokenizer's EOS."""
    from transformers import GenerationConfig

    try:
        stop = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        stop = None
    if stop is None:
        stop = tokenizer.eos_token_id
    if stop is None:
        raise UserError(f"the model in {folder} has no EOS token; add eos_token_id to its generation_config.json")
    return [stop] if isinstance(stop, int) else list(stop)


def start_torch(gpus: int = 1) -> None:
    """Give PyTorch the cores that the job was given and, unless a launcher started several processes, so many GPUs;
    keep weight-loading bars out of the logs."""
    # Memory that was freed serves tensors of other sizes, as batches differ in length. PyTorch reads
    # this when it first uses a GPU. vLLM's exchange between several GPUs does not know such memory.
    if gpus == 1 and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if "LOCAL_RANK" not in os.environ:  # else the Trainer would spread batches over all GPUs it sees
        take_gpus(gpus)
    import torch
    from transformers.utils import logging

    launched = "LOCAL_RANK" in os.environ  # then the launcher divided the cores of the job
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)) if launched else cores_of_job())
    logging.disable_progress_bar()
