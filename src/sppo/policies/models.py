"""Policies as Hugging Face model folders: finding, checking, loading; chat templates; devices."""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sppo.core.artifacts import ROOT, check_link, parse_json, read_json
from sppo.core.errors import UserError
from sppo.policies.gpus import cores_of_job, count_gpus, take_gpus
from sppo.policies.hub import HUB_FILES, hub_failure, hub_token

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
THOUGHT, THOUGHT_END = "<think>", "</think>"
ANSWER = "PLACEHOLDER-OF-AN-ANSWER"  # the assistant's text in a rendered chat
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


def pick_device(device: str) -> str:
    """`cpu`, `cuda` or `mps` for the setting auto, cpu, gpu or mps.

    UserError if PyTorch sees no GPU although the setting is gpu, or although the setting is auto
    and Slurm allocated a GPU. UserError also if the setting is mps without Apple silicon. Warns if
    the setting is auto and only PyTorch sees no GPU.
    """
    import torch

    if device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device is mps, which needs Apple silicon; set device: cpu or gpu")
        return "mps"
    given = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS")
    if device == "auto" and given and not torch.cuda.is_available():
        raise UserError(
            f"Slurm gave this job a GPU (number {given}), but PyTorch sees none; install a CUDA "
            "build of torch, or set device: cpu"
        )
    if device == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "device is gpu, but PyTorch sees no GPU here; set device: cpu, or install a CUDA build "
            "of torch"
        )
    if device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if gpus := count_gpus():
        print(
            f"warning: this machine has {gpus} GPUs, but PyTorch sees none, so this runs on the "
            "CPU; install a newer driver (for CUDA 13, NVIDIA's 580 or newer) or a build of torch "
            "for this GPU, or set device: cpu",
            file=sys.stderr,
        )
    return "cpu"


def compute_dtype(precision: str, device: str) -> torch.dtype:
    """The dtype of the computation for `precision` (auto, bfloat16, float32) on this device.

    auto is bfloat16 if the hardware supports it, otherwise float32, because emulated bfloat16 is
    slower. The environment variable SPPO_AUTO_PRECISION overrides the meaning of auto, so that one
    machine can repeat the computation of another. UserError if its value is unknown.
    """
    import torch

    if precision == "auto":
        precision = os.environ.get("SPPO_AUTO_PRECISION", "auto")
    if precision == "auto":
        if device == "cuda":
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            supported = device == "cpu" and _cpu_has_bfloat16()
        precision = "bfloat16" if supported else "float32"
    if precision not in ("bfloat16", "float32"):
        raise UserError(
            f"SPPO_AUTO_PRECISION is {precision!r}; set bfloat16 or float32, or unset it"
        )
    return getattr(torch, precision)


def weights_dtype(lora_rank: int, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the weights in training and scoring.

    It is float32, because updates are too small for bfloat16. LoRA does not update these weights,
    so with LoRA it is `dtype`, that of the computation.
    """
    import torch

    return dtype if lora_rank else torch.float32


def _cpu_has_bfloat16() -> bool:
    try:
        cpu_flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags)


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


def load_tokenizer(
    folder: Path, template_kwargs: dict[str, Any] | None = None, template_date: str | None = None
) -> PreTrainedTokenizerBase:
    """The policy's tokenizer.

    template_kwargs and template_date are keys of the section `policy` of the configuration, for
    programs that render chats: variables of the chat template, and the date (YYYY-MM-DD) that it
    takes as today. They are written into the chat template of the returned tokenizer, so that every
    rendering uses them. A tokenizer that will be saved with weights is loaded without them.
    UserError if the tokenizer cannot be read, or if its chat template is missing or broken: without
    a chat template, the policy cannot be prompted.
    """
    import jinja2

    try:
        tokenizer = tokenizer_class(folder).from_pretrained(
            folder, padding_side="left", trust_remote_code=False
        )
    except Exception as error:  # the package tokenizers raises the class Exception itself
        raise UserError(
            f"cannot load the tokenizer of {folder} ({_first_line(error)}); copy its "
            "files, tokenizer.json and tokenizer_config.json, again from its base model"
        ) from error
    template = tokenizer.chat_template
    if not template:
        raise UserError(
            f"the tokenizer of {folder} has no chat template; use an instruction-tuned model, or "
            "add chat_template.jinja to the model folder"
        )
    if template_kwargs or template_date:
        variables = template_kwargs or {}
        if isinstance(template, str):
            tokenizer.chat_template = _with_variables(template, variables, template_date)
        else:  # several templates by name
            tokenizer.chat_template = {
                name: _with_variables(each, variables, template_date)
                for name, each in template.items()
            }
    try:
        render_chat(tokenizer, [{"role": "user", "content": "Hello"}])
    except UserError as error:
        if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
            raise UserError(
                f"the chat template of {folder} is broken (line {error.__cause__.lineno}: "
                f"{error.__cause__}); correct it, or copy the template of its base model"
            ) from error
        # Any other refusal may concern this test chat only.
    return tokenizer


def tokenizer_class(folder: Path) -> Any:
    """The class that loads the folder's tokenizer.

    AutoTokenizer reads the model's configuration too, for which it imports PyTorch. That takes two
    seconds in programs that need no model. It is not needed if the folder names the class that
    serves every tokenizer.json.
    """
    import transformers

    settings = Path(folder) / "tokenizer_config.json"
    written = read_json(settings) if settings.is_file() else {}
    name = "TokenizersBackend"  # transformers 4 does not have it
    is_named = written.get("tokenizer_class") == name and "auto_map" not in written
    if not is_named or not hasattr(transformers, name):
        name = "AutoTokenizer"
    return getattr(transformers, name)


def _with_variables(template: str, variables: dict[str, Any], date: str | None) -> str:
    """The chat template with these variables set, and with this date (YYYY-MM-DD) as today."""
    if date:
        today = datetime.date.fromisoformat(date)
        template = re.sub(
            r"strftime_now\s*\(\s*(['\"])(.*?)\1\s*\)",
            lambda call: repr(today.strftime(call[2])),
            template,
        )
        if re.search(r"strftime_now\s*\(", template):
            raise UserError(
                "the policy's chat template computes the format of today's date, so that "
                "policy.template_date cannot replace the date; write the format as a string into "
                "strftime_now(...)"
            )
    assignments = (f"{{% set {name} = {value!r} %}}\n" for name, value in variables.items())
    return "".join(assignments) + template


def load_config(folder: Path) -> Any:
    """The transformers configuration of a model's folder; UserError if it cannot be loaded."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many types; the cause of each is the file's content
        if "auto_map" in read_json(Path(folder) / "config.json"):
            raise UserError(
                f"the model in {folder} needs its own code (auto_map in its config.json), which "
                "is not executed here; give a model that transformers supports"
            ) from error
        raise UserError(
            f"cannot use {folder}/config.json ({_first_line(error)}); correct it, or "
            "give a model that transformers supports"
        ) from error


def load_whole(
    kind: Any,
    folder: Path,
    head: bool = True,
    others: tuple[str, ...] = (),
    what: str = "a causal language model",
    **options: Any,
) -> PreTrainedModel:
    """The model in a folder, loaded by `kind`, a transformers Auto class, with these options.

    UserError if the model cannot be loaded, if names or shapes of weights differ between the file
    and the model, or if a weight is not finite. (transformers itself initialises missing weights at
    random.) In a job of several processes only the first one checks the weights, because the others
    may hold none.

    `head`: whether a language head in the file must be part of the model. `others`: beginnings of
    names of weights that the caller reads itself. `what`: the form of the model, for an error.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the UserErrors below replace its long report
    try:
        model, report = kind.from_pretrained(
            folder,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except (RuntimeError, MemoryError):
        raise
    except Exception as error:  # of many types; the cause of each is the content of the files
        raise UserError(
            f"cannot load the model in {folder} ({_first_line(error)}); give {what} "
            "that transformers supports, saved with save_pretrained"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if int(os.environ.get("RANK", 0)) == 0:
        _check_names_of_weights(report, folder, head, others)
        _check_finite(model, folder)
    return model


def _check_names_of_weights(
    report: dict[str, Any], folder: Path, head: bool, others: tuple[str, ...]
) -> None:
    """UserError if transformers' loading report names differences between file and model."""
    ignored = re.compile(r"rotary_emb\.inv_freq$" + ("" if head else r"|^lm_head\."))
    unexpected = [
        name
        for name in report["unexpected_keys"]
        if not ignored.search(name) and not name.startswith(others)
    ]
    differences = {
        "lack": report["missing_keys"],
        "also have": unexpected,
        "have in another shape": [name for name, *_ in report["mismatched_keys"]],
    }
    found = [f"{kind} {_first_names(names)}" for kind, names in differences.items() if names]
    if found:
        raise UserError(
            f"the weights of {folder} do not belong to the model in its config.json: they "
            f"{', and '.join(found)}; save the model again with save_pretrained"
        )


def _check_finite(model: PreTrainedModel, folder: Path) -> None:
    """UserError if a weight is NaN or infinite."""
    import torch

    for name, weight in model.state_dict().items():
        # aminmax reads the weight once and makes no copy. This takes 0.15 s for the demo's policy,
        # half the time of computing its hash.
        if weight.is_floating_point() and weight.numel() and not weight.is_meta:
            if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(weight)):
                raise UserError(
                    f"the weights of {folder} are not all finite: {name} has NaN or "
                    "infinity; make or save the model again"
                )


def _first_names(names: Any) -> str:
    """The first three names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    """The first line of an error's text, at most 200 characters; its class if it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def load_policy(
    folder: Path, dtype: torch.dtype, device: str | None, attention: str | None = None
) -> PreTrainedModel:
    """The policy in evaluation mode.

    In bfloat16 the update of a LoRA policy is kept apart, see `lora_update.py`.

    Every dropout rate is 0, so that the policy is the same function in training. Without a device
    the model stays where it was loaded, for callers that distribute it over processes. UserError if
    the folder is not a valid policy.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from sppo.policies.lora_update import read_factors, split_update

    check_policy(folder)
    factors = read_factors(folder) if dtype == torch.bfloat16 else {}
    config = load_config(folder)
    for name in vars(config):
        is_dropout = "dropout" in name or name.endswith("_pdrop")
        if is_dropout and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    more: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    stored = torch.float32 if factors else dtype
    model = load_whole(AutoModelForCausalLM, folder, config=config, dtype=stored, **more)
    if factors:
        split_update(model, factors, dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if device:
        model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides `self`
    return model.eval()


def load_frozen_policy(
    folder: Path,
    lora_rank: int,
    dtype: torch.dtype,
    device: str,
    attention: str | None = None,
) -> PreTrainedModel:
    """The policy for programs that only compute its log-probabilities.

    The numbers are those of the policy in training (`load_policy` with `weights_dtype`), bit for
    bit.
    """
    model = load_policy(folder, weights_dtype(lora_rank, dtype), None, attention)
    cast_linear_weights(model, dtype)
    model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides `self`
    return model


def cast_linear_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the weights of linear layers to `dtype`, which autocast would do in every pass.

    This changes no log-probability, halves the memory, and saves the casts. The embeddings are not
    rounded, because autocast does not round them. Often they are the output layer's weights too.
    """
    import torch

    embeddings = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not embeddings:
            module.weight.data = module.weight.data.to(dtype)


def context_length(folder: Path) -> int | None:
    """The most tokens of prompt and response together; None if the model's config does not say."""
    config = read_json(Path(folder) / "config.json")
    return config.get("max_position_embeddings") or config.get("n_positions")


def check_fits(name: str, tokens: int, max_new_tokens: int, context: int | None) -> None:
    """Raise a UserError if a prompt and its answer do not fit the policy's context.

    Args:
        name: the prompt, for the error line.
        tokens: the number of the prompt's tokens.
        max_new_tokens: the longest answer of the evaluation that asks.
        context: from `context_length`.
    """
    if context is None or tokens + max_new_tokens <= context:
        return
    remedy = f"set this evaluation's max_new_tokens to at most {context - tokens}"
    if tokens >= context:
        remedy = "take a policy with a longer context, or other instructions"
    raise UserError(
        f"{name} has {tokens} tokens, and the answer may have {max_new_tokens}, but the policy's"
        f" context has {context}; {remedy}"
    )


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    name: str = "this chat",
    answer_next: bool = True,
) -> str:
    """The text of a chat in the policy's chat template.

    With `answer_next` it ends where the assistant's answer begins. `name` identifies the chat in an
    error. UserError with the template's message if the template refuses the chat.
    """
    try:
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=answer_next, tokenize=False
        )
    except Exception as error:  # an expression in a template may raise any type
        raise UserError(
            f"the policy's chat template refuses {name} ({type(error).__name__}: "
            f"{error}); change it to a form that the template accepts, such as a chat without a "
            "system message"
        ) from error
    return cast(str, rendered)  # a string, because it is one chat and tokenize is False


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], name: str = "this chat"
) -> list[int]:
    """Token ids of the chat up to the beginning of the assistant's answer; see `render_chat`.

    The template writes all special tokens; the tokenizer adds none.
    """
    return tokenizer(render_chat(tokenizer, messages, name), add_special_tokens=False).input_ids


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Strings that the tokenizer would read as control tokens in a text, the longest first.

    They are the special tokens, and the added tokens that the chat template uses. White space and
    words are left out; some tokenizers have them as added tokens.
    """
    added = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
        or (token.content in str(tokenizer.chat_template) and not token.content.isalnum())
    }
    controls = (token for token in added | set(tokenizer.all_special_tokens) if token.strip())
    return sorted(controls, key=lambda token: (-len(token), token))


def check_no_control_tokens(controls: list[str], text: str, name: str) -> None:
    """UserError if a text of an evaluation, called `name`, contains one of the control tokens."""
    if contained := next((token for token in controls if token in text), None):
        raise UserError(
            f"{name} contains {contained}, which the policy would read as a control token "
            "and not as text; remove it there"
        )


def without_control_tokens(controls: list[str], text: str) -> str:
    """A policy's answer for use in a later turn, with a space inserted into each control token.

    <think> and </think> are not changed, because templates use them to remove thoughts.
    """
    for token in controls:
        if token not in (THOUGHT, THOUGHT_END):
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the chat template, for records."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first control token that the chat template writes after an assistant's answer, if any."""
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}]
    try:
        _, answer, after = render_chat(tokenizer, chat, answer_next=False).rpartition(ANSWER)
    except UserError:
        return None
    if not answer:
        return None
    # For a list of tokens, the method returns a list of ids.
    controls = set(cast(list[int], tokenizer.convert_tokens_to_ids(control_tokens(tokenizer))))
    ids = tokenizer(after, add_special_tokens=False).input_ids
    return next((token_id for token_id in ids if token_id in controls), None)


def stop_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that end a response, without repetition.

    They are, in this order, the token that the chat template writes after an assistant's answer,
    the EOS tokens of the generation config, and the tokenizer's EOS token. A policy may have
    learned to end its answer with any of them, and would invent the user's next turn after it.
    UserError if there is none.
    """
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        configured = None
    if not isinstance(configured, list):
        configured = [configured]
    candidates = (end_of_turn_id(tokenizer), *configured, tokenizer.eos_token_id)
    stop_ids = [token_id for token_id in candidates if token_id is not None]
    if not stop_ids:
        raise UserError(
            f"the model in {folder} has no EOS token; add eos_token_id to its "
            "generation_config.json"
        )
    return list(dict.fromkeys(stop_ids))


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensors, where it can (glibc).

    Otherwise it returns large blocks to the system, and each new tensor of some megabytes costs
    page faults, 5 to 15% of the time of a job on a CPU.
    """
    mmap_max, trim_threshold = -4, -1  # the numbers of malloc.h
    try:
        library = ctypes.CDLL(None)
        library.mallopt(mmap_max, 0)  # all memory is from the heap, not from mappings
        library.mallopt(trim_threshold, 2**31 - 1)  # which is not shrunk
    except (OSError, AttributeError, TypeError):
        return  # another C library


def start_torch(gpus: int = 1) -> None:
    """Set up PyTorch for this job: its GPUs, its number of threads, and quiet logs.

    gpus: how many GPUs to reserve. A launcher of several processes (LOCAL_RANK is set) has already
    assigned the GPUs and divided the cores of the job.
    """
    # With expandable segments, freed memory can hold tensors of other sizes. This matters because
    # batches differ in length. PyTorch reads the variable when it first uses a GPU. vLLM's
    # communication between several GPUs does not support such memory.
    if gpus == 1 and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    launched = "LOCAL_RANK" in os.environ
    if not launched:
        take_gpus(gpus)  # otherwise the Trainer would use all GPUs that it sees
    import torch
    from transformers.utils import logging

    if launched:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    else:
        torch.set_num_threads(cores_of_job())
    if not torch.cuda.is_available():
        keep_freed_memory()
    logging.disable_progress_bar()
