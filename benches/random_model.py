"""Writes a model of random weights in a given shape: a GGUF file, or a directory with safetensors.

Owns the file layouts and a made-up vocabulary. Never measures. The thing to know: such a model says nothing sensible; it is
for figures that depend on shape and storage alone, such as the time of a start. Weights repeat a pool of random blocks, so a
file takes seconds to write; scales are such that activations stay finite.

    python3 benches/random_model.py 8b q4_0 8b-q4_0.gguf         4.1 GB
    python3 benches/random_model.py 1b bf16 1b-bf16.gguf         2.1 GB
    python3 benches/random_model.py 1b q8_0 1b-q8_0.gguf         1.1 GB
    python3 benches/random_model.py 1b safetensors 1b-bf16       the same weights as a directory
"""
import json
import random
import struct
import sys
from pathlib import Path

# layers, hidden, ffn, heads, kv heads, tied head
SHAPES = {"8b": (32, 4096, 14336, 32, 8, False), "1b": (16, 2048, 8192, 32, 8, True)}
VOCAB = 32000
CONTEXT = 8192
# GGUF's number of a type, values and bytes of a block
TYPES = {"f32": (0, 1, 4), "q4_0": (2, 32, 18), "q8_0": (8, 32, 34), "q6_k": (14, 256, 210), "bf16": (30, 1, 2)}
POOL_BYTES = 8 << 20
STD = 0.02
ALIGN = 32
TEMPLATE = ("{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def half(value):
    return struct.pack("<e", value)


def block(kind, rng):
    """One block of random values with a standard deviation near STD."""
    match kind:
        case "f32":
            return struct.pack("<f", 1.0)
        case "bf16":
            return struct.pack("<f", rng.gauss(0, STD))[2:]
        case "q4_0":
            return half(STD / 4.6 * rng.uniform(0.8, 1.2)) + rng.randbytes(16)
        case "q8_0":
            return half(STD / 74 * rng.uniform(0.8, 1.2)) + rng.randbytes(32)
        case "q6_k":
            return rng.randbytes(192) + bytes([64] * 16) + half(STD / 18 / 64 * rng.uniform(0.8, 1.2))


def pool(kind, rng):
    _, _, size = TYPES[kind]
    return b"".join(block(kind, rng) for _ in range(max(1, min(POOL_BYTES // size, 1 << 17))))


def write_weights(out, kind, values, pools, rng):
    """A tensor: blocks of the pool from a random one on."""
    _, per, size = TYPES[kind]
    left, blocks = values // per * size, len(pools[kind]) // size
    start = rng.randrange(blocks) * size
    while left > 0:
        piece = pools[kind][start:start + left]
        out.write(piece)
        left, start = left - len(piece), 0


def tensors(shape, kind):
    """(GGUF's name, Hugging Face's, dimensions slowest first, type) in the order of llama.cpp's converter."""
    layers, hidden, ffn, heads, kv_heads, tied = shape
    kv = hidden // heads * kv_heads
    if not tied:
        yield "output.weight", "lm_head.weight", (VOCAB, hidden), "q6_k" if kind == "q4_0" else kind
    yield "token_embd.weight", "model.embed_tokens.weight", (VOCAB, hidden), kind
    matrices = [("attn_q", "self_attn.q_proj", (hidden, hidden)), ("attn_k", "self_attn.k_proj", (kv, hidden)),
                ("attn_v", "self_attn.v_proj", (kv, hidden)), ("attn_output", "self_attn.o_proj", (hidden, hidden)),
                ("ffn_gate", "mlp.gate_proj", (ffn, hidden)), ("ffn_up", "mlp.up_proj", (ffn, hidden)),
                ("ffn_down", "mlp.down_proj", (hidden, ffn))]
    norms = [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")]
    for layer in range(layers):
        for name, hf, dims in matrices:
            yield f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{hf}.weight", dims, kind
        for name, hf in norms:
            yield f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{hf}.weight", (hidden,), "f32"
    yield "output_norm.weight", "model.norm.weight", (hidden,), "f32"


def vocabulary(rng):
    """Byte tokens, merges of two tokens that were there before, and control tokens, as byte-level BPE has them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letters = [chr(b) if b in printable else chr(next(others)) for b in range(256)]
    special = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokens, seen, merges = list(letters), set(letters), []
    while len(tokens) < VOCAB - len(special):
        left, right = rng.choice(tokens[:4096]), rng.choice(tokens[:1024])
        if len(left + right) <= 8 and left + right not in seen:
            seen.add(left + right)
            tokens.append(left + right)
            merges.append(f"{left} {right}")
    return tokens, special, merges


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def metadata(shape, rng):
    """GGUF's key-value pairs, and how many they are."""
    layers, hidden, ffn, heads, kv_heads, _ = shape
    tokens, special, merges = vocabulary(rng)
    types = [1] * len(tokens) + [3] * len(special)
    number = lambda n: struct.pack("<II", 4, n)
    real = lambda x: struct.pack("<If", 6, x)
    string = lambda s: struct.pack("<I", 8) + text(s)
    strings = lambda all: struct.pack("<IIQ", 9, 8, len(all)) + b"".join(map(text, all))
    integers = lambda all: struct.pack("<IIQ", 9, 5, len(all)) + struct.pack(f"<{len(all)}i", *all)
    pairs = {
        "general.architecture": string("llama"), "general.name": string("random"),
        "llama.block_count": number(layers), "llama.context_length": number(CONTEXT),
        "llama.embedding_length": number(hidden), "llama.feed_forward_length": number(ffn),
        "llama.attention.head_count": number(heads), "llama.attention.head_count_kv": number(kv_heads),
        "llama.attention.layer_norm_rms_epsilon": real(1e-5), "llama.rope.freq_base": real(500000.0),
        "llama.rope.dimension_count": number(hidden // heads), "llama.vocab_size": number(VOCAB),
        "tokenizer.ggml.model": string("gpt2"), "tokenizer.ggml.pre": string("llama-bpe"),
        "tokenizer.ggml.tokens": strings(tokens + special), "tokenizer.ggml.token_type": integers(types),
        "tokenizer.ggml.merges": strings(merges), "tokenizer.ggml.bos_token_id": number(len(tokens)),
        "tokenizer.ggml.eos_token_id": number(len(tokens) + 1), "tokenizer.chat_template": string(TEMPLATE),
    }
    return len(pairs), b"".join(text(key) + value for key, value in pairs.items())


def gguf(shape, kind, path):
    rng = random.Random(22)
    all_tensors = list(tensors(shape, kind))
    pools = {k: pool(k, rng) for k in {t[3] for t in all_tensors}}
    count, pairs = metadata(shape, rng)
    infos, offset = b"", 0
    for name, _, dims, of in all_tensors:
        number, per, size = TYPES[of]
        infos += text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *reversed(dims))
        infos += struct.pack("<IQ", number, offset)
        values = dims[0] * (dims[1] if len(dims) > 1 else 1)
        offset += -(-values // per * size // ALIGN) * ALIGN
    with open(path, "wb") as out:
        out.write(struct.pack("<4sIQQ", b"GGUF", 3, len(all_tensors), count) + pairs + infos)
        out.write(bytes(-out.tell() % ALIGN))
        for _, _, dims, of in all_tensors:
            write_weights(out, of, dims[0] * (dims[1] if len(dims) > 1 else 1), pools, rng)
            out.write(bytes(-out.tell() % ALIGN))


def directory(shape, path):
    rng = random.Random(22)
    layers, hidden, ffn, heads, kv_heads, tied = shape
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokens, special, merges = vocabulary(rng)
    (path / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "hidden_size": hidden,
        "intermediate_size": ffn, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": tied,
        "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": len(tokens), "eos_token_id": len(tokens) + 1}))
    added = [{"id": len(tokens) + i, "content": t, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for i, t in enumerate(special)]
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (path / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": bytes_of, "post_processor": None, "decoder": bytes_of,
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens + special)}, "merges": merges}}))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE}))
    header, offset = {}, 0
    all_tensors = [(hf, dims) for _, hf, dims, _ in tensors(shape, "bf16")]
    for hf, dims in all_tensors:
        size = 2 * dims[0] * (dims[1] if len(dims) > 1 else 1)
        header[hf] = {"dtype": "BF16", "shape": dims, "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    pools = {"bf16": pool("bf16", rng)}
    with open(path / "model.safetensors", "wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        for hf, dims in all_tensors:
            if len(dims) == 1:
                out.write(struct.pack("<f", 1.0)[2:] * dims[0])
            else:
                write_weights(out, "bf16", dims[0] * dims[1], pools, rng)


def main():
    if len(sys.argv) != 4 or sys.argv[1] not in SHAPES or sys.argv[2] not in ("q4_0", "q8_0", "bf16", "safetensors"):
        sys.exit(__doc__)
    shape, kind, path = SHAPES[sys.argv[1]], sys.argv[2], sys.argv[3]
    directory(shape, path) if kind == "safetensors" else gguf(shape, kind, path)


if __name__ == "__main__":
    main()
