"""Policies as Hugging Face folders: finding, checking and loading them; chat templates; devices."""

from __future__ import annotations

import datetime
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sppo.core.artifacts import ROOT, check_link, parse_json, read_json
from sppo.core.errors import UserError
from sppo.policies.gpus import cores_of_job, take_gpus
from sppo.policies.hub import hub_failure, hub_token

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
THOUGHT, THOUGHT_END = "<think>", "</think>"
ANSWER = "PLACEHOLDER-OF-AN-ANSWER"  # where a rendered chat has the assistant's words
# By config.model_type, why a model that AutoModelForCausalLM loads cannot be a policy.
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
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]


def pick_device(device: str) -> str:
    """`cpu` or `cuda` for auto, cpu or gpu. Asking for a GPU that is not there is a UserError, and so is leaving one idle that Slurm gave."""
    import torch

    given = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS")
    if device == "auto" and given and not torch.cuda.is_available():
        raise UserError(
            f"Slurm gave this job a GPU (number {given}), but PyTorch sees none; install a CUDA build of torch, or set device: cpu"
        )
    if device == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "device is gpu, but PyTorch sees no GPU here; set device: cpu, or install a CUDA build of torch"
        )
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def compute_dtype(precision: str, device: str) -> torch.dtype:
    """The type that `precision` (auto, bfloat16, float32) means on this device.

    auto is bfloat16 where the hardware multiplies in it, because where it is emulated it is slower
    than float32. The environment variable SPPO_AUTO_PRECISION says what auto is instead, so that one
    machine can repeat what another did.
    """
    import torch

    if precision == "auto":
        precision = os.environ.get("SPPO_AUTO_PRECISION", "auto")
    if precision == "auto":
        on_gpu = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if on_gpu or device == "cpu" and _cpu_has_bfloat16() else "float32"
    if precision not in ("bfloat16", "float32"):
        raise UserError(
            f"SPPO_AUTO_PRECISION is {precision!r}; set bfloat16 or float32, or unset it"
        )
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
        raise UserError(
            f"model {source!r} is neither a folder nor a hub id such as org/model; correct {key}"
        )
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(
            snapshot_download(
                source, revision=revision, allow_patterns=HUB_FILES, token=hub_token()
            )
        )
    except (
        Exception
    ) as error:  # the hub client raises many types; each is a matter of name, network or access
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"cannot get model {source}{at} from the hub {hub_failure(error)}, "
            f"or give a local folder; there is no folder {source} here either"
        ) from error
    return snapshot, snapshot.name


def link_files(folder: Path, target: Path) -> None:
    """Make `target` a folder of links to the files of a model's folder.

    Within this checkout they are relative, so that it can be moved.
    """
    target.mkdir()
    place = target.resolve()
    for file in sorted({file for pattern in HUB_FILES for file in folder.glob(pattern)}):
        source = file.resolve()
        inside = source.is_relative_to(ROOT) and place.is_relative_to(ROOT)
        (target / file.name).symlink_to(os.path.relpath(source, place) if inside else source)


def check_policy(folder: Path, made_here: bool = True) -> None:
    """A policy folder has a config, whole weights and a tokenizer; else a UserError says what it lacks.

    `made_here` tells one of the workflow's own, which can be made again, from a user's.
    """
    remedy = (
        "delete the folder and make it again"
        if made_here
        else "save the model with save_pretrained, as safetensors"
    )
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"policy folder {folder} does not exist; correct the path or make it")
    for file in sorted(folder.iterdir()):
        check_link(file, remedy)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"policy folder {folder} has no config.json; it is not a Hugging Face model folder"
        )
    read = {
        name: _read_object(folder / name, remedy)
        for name in JSON_FILES
        if (folder / name).is_file()
    }
    if quantised := read["config.json"].get("quantization_config"):
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"the weights of {folder} are quantised ({kind}), and quantised weights "
            "cannot be trained; give the model that they were made from"
        )
    architecture = read["config.json"].get("model_type")
    if architecture in UNSUPPORTED_ARCHITECTURES:
        raise UserError(
            f"policy folder {folder} is of the architecture {architecture}, which cannot be used "
            f"here: {UNSUPPORTED_ARCHITECTURES[architecture]}; choose a model of another "
            "architecture"
        )
    index = read.get(WEIGHTS_INDEX)
    if index is not None and not isinstance(index.get("weight_map"), dict):
        raise UserError(f"{folder / WEIGHTS_INDEX} has no weight_map; {remedy}")
    names = ["model.safetensors"]
    if index is not None:
        names = sorted(set(map(str, index["weight_map"].values())))
    for name in names:
        weights = folder / name
        if not weights.is_file():
            raise UserError(f"policy folder {folder} has no weights ({name} is missing); {remedy}")
        if safetensors_header(weights) is None:
            raise UserError(f"{weights} is cut off or is not a safetensors file; {remedy}")
    if not any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    ):
        raise UserError(
            f"policy folder {folder} has no tokenizer; copy the tokenizer files of its base model into it"
        )


def _read_object(file: Path, remedy: str) -> dict[str, Any]:
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
    """Tensors by name, as the file's header describes them; None if the file is cut off or of another form."""
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


def load_tokenizer(
    folder: Path, template_kwargs: dict[str, Any] | None = None, template_date: str | None = None
) -> PreTrainedTokenizerBase:
    """The policy's tokenizer.

    template_kwargs, template_date: of the section `policy` of the configuration, for programs that
    render chats. They are written into the chat template of what is returned, so that every
    rendering has them; a tokenizer that is saved beside weights is loaded without them.
    Raises `UserError` if it cannot be read, or if its chat template is missing or broken: there is
    no other way to prompt it.
    """
    import jinja2
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, padding_side="left", trust_remote_code=False
        )
    except Exception as error:  # the tokenizers package raises Exception itself
        raise UserError(
            f"cannot load the tokenizer of {folder} ({_first_line(error)}); copy its "
            "files, tokenizer.json and tokenizer_config.json, again from the model that "
            "it came with"
        ) from error
    template = tokenizer.chat_template
    if not template:
        raise UserError(
            f"the tokenizer of {folder} has no chat template; use an instruction-tuned model, or add "
            "chat_template.jinja to the model folder"
        )
    if template_kwargs or template_date:
        settled = (template_kwargs or {}, template_date)
        tokenizer.chat_template = (
            _settled(template, *settled)
            if isinstance(template, str)
            else {name: _settled(each, *settled) for name, each in template.items()}
        )
    try:
        render_chat(tokenizer, [{"role": "user", "content": "Hello"}])
    except UserError as error:
        if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
            raise UserError(
                f"the chat template of {folder} is broken (line "
                f"{error.__cause__.lineno}: "
                f"{error.__cause__}); correct it, or copy that of its base "
                "model"
            ) from error
    return tokenizer


def _settled(template: str, variables: dict[str, Any], date: str | None) -> str:
    """A chat template that has these variables, and takes this date (YYYY-MM-DD) for today's."""
    if date:
        today = datetime.date.fromisoformat(date)
        template = re.sub(
            r"strftime_now\s*\(\s*(['\"])(.*?)\1\s*\)",
            lambda call: repr(today.strftime(call[2])),
            template,
        )
        if re.search(r"strftime_now\s*\(", template):
            raise UserError(
                "the policy's chat template prints today's date in a form that it "
                "computes, so that policy.template_date cannot take its place; write the form "
                "into strftime_now(...) as a text"
            )
    values = (f"{{% set {name} = {value!r} %}}\n" for name, value in variables.items())
    return "".join(values) + template


def load_config(folder: Path) -> Any:
    """The transformers configuration of a model's folder; UserError if it cannot be loaded."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many types: each is a matter of what the file says
        if "auto_map" in read_json(Path(folder) / "config.json"):
            raise UserError(
                f"the model in {folder} needs code of its own (auto_map in its "
                "config.json), which is not executed here; give a model that "
                "transformers knows"
            ) from error
        raise UserError(
            f"cannot use {folder}/config.json ({_first_line(error)}); correct it, or "
            "give a model that transformers knows"
        ) from error


def load_whole(kind: Any, folder: Path, head: bool = True, **options: Any) -> PreTrainedModel:
    """The model that `kind`, a transformers Auto class, loads from a folder.

    UserError if the file and the model differ in names or shapes of weights, which transformers
    makes up for with random ones, or if a weight is not finite. `head`: whether a language head in
    the file has to be in the model. Of several processes only the first checks: it has all weights.
    """
    import torch
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # its report of many lines says what the error says
    try:
        model, found = kind.from_pretrained(
            folder,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except (RuntimeError, MemoryError):
        raise
    except Exception as error:  # of many types: each is a matter of what the files say
        raise UserError(
            f"cannot load the model in {folder} ({_first_line(error)}); give a causal "
            "language model that transformers knows, saved with save_pretrained"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if int(os.environ.get("RANK", 0)) != 0:
        return model
    ignored = re.compile(r"rotary_emb\.inv_freq$" + ("" if head else r"|^lm_head\."))
    wrong = {
        "lack": found["missing_keys"],
        "have besides": [name for name in found["unexpected_keys"] if not ignored.search(name)],
        "have in another shape": [name for name, *_ in found["mismatched_keys"]],
    }
    differ = [f"{what} {_some(names)}" for what, names in wrong.items() if names]
    if differ:
        raise UserError(
            f"the weights of {folder} are not those of the model that its config.json "
            f"names: they {', and '.join(differ)}; save the model again with "
            "save_pretrained"
        )
    for name, weight in model.state_dict().items():
        # One pass without a copy, 0.15 s for the demo's policy, half of what its hash takes.
        if weight.is_floating_point() and weight.numel() and not weight.is_meta:
            if not all(bool(torch.isfinite(end)) for end in torch.aminmax(weight)):
                raise UserError(
                    f"the weights of {folder} are not all finite: {name} has NaN or "
                    "infinity; make or save the model again"
                )
    return model


def _some(names: Any) -> str:
    """The first names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def load_policy(
    folder: Path, dtype: torch.dtype, device: str | None, attention: str | None = None
) -> PreTrainedModel:
    """The policy in evaluation mode, with every dropout at 0 so that it is the same function when trained.

    Without a device it stays where it was read, for who divides it over processes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_policy(folder)
    config = load_config(folder)
    for name in vars(config):
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(
            getattr(config, name), float
        ):
            setattr(config, name, 0.0)
    more: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    model = load_whole(AutoModelForCausalLM, folder, config=config, dtype=dtype, **more)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if device:
        model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides `self`
    return model.eval()


def context_length(folder: Path) -> int | None:
    """Most tokens that the model takes, prompt and response together; None if its config does not say."""
    config = read_json(Path(folder) / "config.json")
    return config.get("max_position_embeddings") or config.get("n_positions")


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    name: str = "this chat",
    answer_next: bool = True,
) -> str:
    """The chat as the template writes it, up to where the assistant begins if `answer_next`.

    `name` says which it is. One that the template refuses is a UserError with the template's words.
    """
    try:
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=answer_next, tokenize=False
        )
    except Exception as error:  # a template may fail in any way that its expressions can
        raise UserError(
            f"the policy's chat template refuses {name} ({type(error).__name__}: "
            f"{error}); change it to what the template takes, such as a chat without a system "
            "message"
        ) from error
    return cast(str, rendered)  # of one chat, and not made into tokens


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], name: str = "this chat"
) -> list[int]:
    """Token ids of the chat up to where the assistant begins, with nothing before the template's.

    `name` says which it is. One that the template refuses is a UserError with the template's words.
    """
    return tokenizer(render_chat(tokenizer, messages, name), add_special_tokens=False).input_ids


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What would be read as a control token in a text: added tokens, special or in the template.

    The longest come first. White space and words are left out, which some tokenizers have as added
    tokens.
    """
    added = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
        or (token.content in str(tokenizer.chat_template) and not token.content.isalnum())
    }
    found = (token for token in added | set(tokenizer.all_special_tokens) if token.strip())
    return sorted(found, key=lambda token: (-len(token), token))


def check_no_control_tokens(controls: list[str], text: str, name: str) -> None:
    """UserError if a text of an evaluation, called `name`, spells a control token of the policy."""
    if spelled := next((token for token in controls if token in text), None):
        raise UserError(
            f"{name} spells {spelled}, which the policy would read as a control token "
            "and not as text; remove it there"
        )


def without_control_tokens(controls: list[str], text: str) -> str:
    """A policy's own text for a later turn, with a space in the control tokens that it spells.

    Marks of thoughts stay, because templates cut thoughts at them.
    """
    for token in controls:
        if token not in (THOUGHT, THOUGHT_END):
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the chat template, for records."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The control token that the chat template writes first behind an assistant's turn, if any."""
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}]
    try:
        _, answer, behind = render_chat(tokenizer, chat, answer_next=False).rpartition(ANSWER)
    except UserError:
        return None
    # A list of tokens gives a list of ids.
    controls = set(cast(list[int], tokenizer.convert_tokens_to_ids(control_tokens(tokenizer))))
    ids = tokenizer(behind, add_special_tokens=False).input_ids if answer else []
    return next((number for number in ids if number in controls), None)


def stop_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response, first the one that ends it as the chat template writes it.

    They are what the template writes behind an assistant's turn, the generation config's and the
    tokenizer's EOS: a policy may have been taught any of them, and behind each it would invent the
    next turn.
    """
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        configured = None
    several = configured if isinstance(configured, list) else [configured]
    ends = (end_of_turn_id(tokenizer), *several, tokenizer.eos_token_id)
    found = [number for number in ends if number is not None]
    if not found:
        raise UserError(
            f"the model in {folder} has no EOS token; add eos_token_id to its generation_config.json"
        )
    return list(dict.fromkeys(found))


def start_torch(gpus: int = 1) -> None:
    """Give PyTorch the cores that the job was given and, unless a launcher started several processes, so many GPUs;
    keep weight-loading bars out of the logs."""
    # Memory that was freed serves tensors of other sizes, as batches differ in length. PyTorch reads
    # this when it first uses a GPU. vLLM's exchange between several GPUs does not know such memory.
    if gpus == 1 and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if (
        "LOCAL_RANK" not in os.environ
    ):  # else the Trainer would spread batches over all GPUs it sees
        take_gpus(gpus)
    import torch
    from transformers.utils import logging

    launched = "LOCAL_RANK" in os.environ  # then the launcher divided the cores of the job
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)) if launched else cores_of_job())
    logging.disable_progress_bar()
