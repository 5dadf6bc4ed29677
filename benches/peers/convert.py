"""Turns the demo model and its adapters into what the peers read; runs in the peers' own Python.

Owns the conversions that need transformers. Never quantises: llama-quantize does that. The thing to know: every contender
gets the demo file's own values, rounded to bf16 once, so that all compute the same model.

    convert.py hf MODEL.gguf OUT                        a Hugging Face directory
    convert.py lora CONVERTER HF OUT ADAPTER_DIR...     one GGUF adapter for each, by llama.cpp's own converter
"""
import runpy
import sys
from pathlib import Path


def hf(gguf, out):
    import torch
    import transformers
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    part = out.with_suffix(".part")
    read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    del read.config.quantization_config  # says GGUF, and such a model will not be saved
    model = transformers.AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(part)
    transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(part)
    part.rename(out)


def lora(converter, base, out, folders):
    """In one process: importing torch takes longer than converting an adapter."""
    sys.path.insert(1, str(converter.parent))
    out.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        part = out / f"{folder.name}.part"
        # f16: the converter's own default, f32, is slower in every row.
        sys.argv = [str(converter), "--base", str(base), "--outtype", "f16", "--outfile", str(part), str(folder)]
        runpy.run_path(str(converter), run_name="__main__")
        part.rename(out / f"{folder.name}.gguf")


if __name__ == "__main__":
    verb, *paths = sys.argv[1:]
    first, second, *rest = map(Path, paths)
    hf(first, second) if verb == "hf" else lora(first, second, rest[0], rest[1:])
