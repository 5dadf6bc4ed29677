#!/usr/bin/env python3
"""Loads merged or trained adapters with PEFT itself and compares logprobs with a running polylora (not part of build or tests).

Needs torch, transformers and peft in the running Python, and a server of the same adapters on the demo model in f32:

    polylora merge adapters/pirate=0.7 adapters/blurb=0.5 --out both
    polylora serve --dtype f32 --adapter both=both
    python benches/merge_in_peft.py --gguf ~/.cache/polylora/SmolLM2-135M-Instruct.Q4_1.gguf both=both

Trained ones are left by `POLYLORA_EXPORTS=DIR cargo test --test model exports_of_the_demo_model`: lora, rslora and dora.

For each adapter and text it prints the largest difference between the two logprobs of every token of the text; exit code 1 when one is above
--tolerance. The weights are the file's, dequantised here and rounded to bf16, as the server has them.
"""
import argparse
import json
import struct
import warnings

import numpy as np
import peft
import torch
import transformers

from served import ask

TEXTS = [
    "What is a bicycle? A bicycle is a vehicle with two wheels, arr!",
    '{"category": "billing", "priority": "high", "product": "CloudBox"}',
    "SELECT COUNT(*) FROM orders WHERE total > 100; -- the answer",
]
SHAPE = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
             num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
             rope_theta=100000.0, rms_norm_eps=1e-5, max_position_embeddings=8192)
NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj", "output_norm": "model.norm", "token_embd": "model.embed_tokens"}
FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Gguf:
    """Reads the tensors of one GGUF file (F32, Q8_0, Q4_1)."""

    def __init__(self, path):
        self.data, self.at = open(path, "rb").read(), 0
        _, _, tensors, fields = self.take("<4sIQQ")
        for _ in range(fields):
            self.text()
            self.value(self.take("<I")[0])
        self.tensors = {}
        for _ in range(tensors):
            name = self.text()
            dims = self.take(f"<{self.take('<I')[0]}Q")
            kind, offset = self.take("<IQ")
            self.tensors[name] = (dims[::-1], kind, offset)
        self.start = (self.at + 31) // 32 * 32

    def take(self, form):
        out = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return out

    def text(self):
        n = self.take("<Q")[0]
        self.at += n
        return self.data[self.at - n:self.at].decode()

    def value(self, kind):
        if kind == 8:
            self.text()
        elif kind == 9:
            inner, n = self.take("<IQ")
            for _ in range(n):
                self.value(inner)
        else:
            self.take("<" + FIXED[kind])

    def read(self, name):
        dims, kind, offset = self.tensors[name]
        n, at = int(np.prod(dims)), self.start + offset
        if kind == 0:
            values = np.frombuffer(self.data, np.float32, n, at)
        elif kind == 8:
            raw = np.frombuffer(self.data, np.uint8, n // 32 * 34, at).reshape(-1, 34)
            d = raw[:, :2].copy().view(np.float16).astype(np.float32)
            values = d * raw[:, 2:].view(np.int8)
        else:
            assert kind == 3, kind
            raw = np.frombuffer(self.data, np.uint8, n // 32 * 20, at).reshape(-1, 20)
            d, m = raw[:, :4].copy().view(np.float16).astype(np.float32).T[:, :, None]
            quads = raw[:, 4:]
            values = d * np.concatenate([quads & 15, quads >> 4], 1) + m
        return torch.from_numpy(np.array(values, np.float32).reshape(dims))


def base(path):
    gguf = Gguf(path)
    state = {}
    for name in gguf.tensors:
        parts = name.split(".")
        weight = gguf.read(name).bfloat16().float()
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):  # rotated pairs back to halves
                heads = weight.shape[0] // 64
                weight = weight.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(weight.shape)
            target = f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"
        else:
            target = f"{NAMES[parts[0]]}.weight"
        state[target] = weight
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing in ([], ["lm_head.weight"]), (missing, unexpected)
    model.tie_weights()
    return model


def served(url, model, ids):
    body = {"model": model, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
    return ask(url, "/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"][1:]


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--gguf", required=True)
    p.add_argument("--url", default="http://127.0.0.1:8080")
    p.add_argument("--tolerance", type=float, default=1e-3)
    p.add_argument("adapters", nargs="+", metavar="NAME=DIR")
    a = p.parse_args()
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    print(json.dumps(versions))
    model, wrong = base(a.gguf), False
    for i, (name, folder) in enumerate(x.split("=", 1) for x in a.adapters):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            if i == 0:
                model = peft.PeftModel.from_pretrained(model, folder, adapter_name=name).eval()
            else:
                model.load_adapter(folder, adapter_name=name)
            model.set_adapter(name)
        for text in TEXTS:
            tokens = ask(a.url, "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
            ids = torch.tensor([tokens])
            with torch.inference_mode():
                logits = model(ids).logits[0].log_softmax(-1)
            theirs = logits[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
            apart = max(abs(x - y) for x, y in zip(theirs, served(a.url, name, tokens), strict=True))
            wrong |= apart > a.tolerance
            print(json.dumps({"adapter": name, "tokens": len(tokens), "logprobs_apart": apart}))
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
