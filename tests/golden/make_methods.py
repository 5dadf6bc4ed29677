"""Makes train/methods.json: curves of training methods on a tiny model, in f64.

The model is `llama` of models.json, by its formula (make_models.py), and adapters are PEFT's on it. PEFT has no
nested ranks and no length-normalised pairs: these are a few lines of torch here. Optimisers are torch's AdamW,
transformers' Adafactor, and Lion as its paper's program 1 has it; EVA's start is torch's QR. Needs torch, transformers and peft:
`python make_methods.py > train/methods.json`.
"""

import json

import peft
import torch
import transformers
from make_models import BASE, CASES, uniform, weight
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.optimization import Adafactor

RANK, ALPHA, BATCH, STEPS, BETA, SEED = 3, 6, 4, 6, 0.1, 7
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def numbers(name, count):
    return torch.from_numpy(uniform(name, count)).double()


def base():
    made = AutoConfig.for_model("llama", **{k: v for k, v in {**BASE, **CASES["llama"]}.items() if k != "model_type"})
    made._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    model.load_state_dict({k: weight(k, tuple(v.shape), False) for k, v in model.state_dict().items()})
    return model.double()


def adapted(**options):
    """The model with an adapter that starts as tests/support/src/training.rs has it, and B at a tenth of its names."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, lora_dropout=0.0, **options)
    model = get_peft_model(base(), config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.copy_(numbers(oracle_name(name), p.numel()).view_as(p) * torch.tensor(2 / p.shape[1] ** 0.5).float())
            elif "lora_B" in name:
                p.copy_(numbers(oracle_name(name), p.numel()).view_as(p) * torch.tensor(0.1).float())
    return model


def oracle_name(name):
    site = "layers." + name.split("layers.", 1)[1]
    for part, ours in [("lora_A.", "lora_A"), ("lora_B.", "lora_B"), ("lora_magnitude_vector.", "magnitude")]:
        if part in site:
            return site.split("." + part)[0] + "." + ours
    raise ValueError(name)


def three(name, tensor):
    flat = tensor.detach().double().flatten()
    return [flat.norm().item()] + [(flat @ numbers(f"{name}/{i}", len(flat))).item() for i in (1, 2)]


def row(name):
    """Ids and where supervision begins, as tests/model/trainer.rs makes its examples."""
    u = uniform(name, 13) + 0.5
    length = 3 + int(u[0] * 10)
    return [int(x * 100) for x in u[1 : 1 + length]]


def log_probs(model, ids):
    """Of every token from the third on."""
    logits = model(torch.tensor([ids])).logits[0, 1:-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[2:])[:, None])[:, 0]


def supervised(model, batch):
    rows = [row(f"methods/{i}") for i in batch]
    total = sum(len(ids) - 2 for ids in rows)
    return -sum(log_probs(model, ids).sum() for ids in rows) / total


def pairs(model, batch, normalised, references={}):
    """Held against the adapter as it starts."""
    losses = []
    for i in batch:
        sums = []
        for which in ("chosen", "rejected"):
            name = f"methods/{which}/{i}"
            ids = row(name)
            if not references:
                start = adapted()
                with torch.no_grad():
                    names = [f"methods/{w}/{n}" for w in ("chosen", "rejected") for n in range(STEPS * BATCH)]
                    references.update({n: log_probs(start, row(n)).sum() for n in names})
            sums.append((log_probs(model, ids).sum() - references[name]) / (len(ids) - 2 if normalised else 1))
        losses.append(-torch.nn.functional.logsigmoid(BETA * (sums[0] - sums[1])))
    return sum(losses) / len(losses)


class Lion(torch.optim.Optimizer):
    """Program 1 of arXiv 2302.06675."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = torch.sign(0.9 * m + 0.1 * p.grad)
                self.state[p]["m"] = 0.99 * m + 0.01 * p.grad
                p -= group["lr"] * (update + group["weight_decay"] * p)


def adafactor(params, lr, weight_decay):
    return Adafactor(params, lr=lr, weight_decay=weight_decay, scale_parameter=False, relative_step=False)


def adamw(params, lr, weight_decay):
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)


MASK = (1 << 64) - 1


def mixed(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def first_of_stream(*words):
    """The first number in [0, 1) of a stream of src/random.rs."""
    state = 0x243F6A8885A308D3
    for word in words:
        state = mixed(state ^ mixed(word))
    return (mixed((state + 0x9E3779B97F4A7C15) & MASK) >> 11) / 2**53


def word(text):
    h = 0xCBF29CE484222325
    for byte in text.encode():
        h = ((h ^ byte) * 0x100000001B3) & MASK
    return h


def nest(model, rank):
    """Every adapted linear reads and writes by its first ranks only."""

    def forward(layer, x):
        a, b = layer.lora_A["default"].weight[:rank], layer.lora_B["default"].weight[:, :rank]
        return layer.base_layer(x) + layer.scaling["default"] * (x @ a.T) @ b.T

    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            layer.forward = forward.__get__(layer)


def curve(make, lr, weight_decay=0.01, frozen=(), loss=supervised, dora=False, nested=False):
    model = adapted(use_dora=dora)
    for name, p in model.named_parameters():
        p.requires_grad_(any(k in name for k in ("lora_A", "lora_B", "magnitude")) and not any(f in name for f in frozen))
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    factors = [p for n, p in trained if "magnitude" not in n]
    groups = [{"params": factors, "weight_decay": weight_decay}]
    if vectors := [p for n, p in trained if "magnitude" in n]:
        groups.append({"params": vectors, "weight_decay": 0.0})
    optimizer = make(groups, lr, weight_decay)
    out = {"loss": [], "grad_norm": [], "ranks": []}
    for step in range(STEPS):
        if nested:
            out["ranks"].append(1 + int(first_of_stream(SEED, step, word("nested")) * RANK))
            nest(model, out["ranks"][-1])
        value = loss(model, range(step * BATCH, (step + 1) * BATCH))
        optimizer.zero_grad(set_to_none=False)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        optimizer.step()
        out["loss"].append(value.item())
        out["grad_norm"].append(norm.item())
    names = [(oracle_name(n), p) for n, p in model.named_parameters() if "lora_" in n]
    out["factors"] = {name: three(name, p) for name, p in names}
    return {k: v for k, v in out.items() if v}


def stream(*words):
    """Numbers in [0, 1) of a stream of src/random.rs."""
    state = 0x243F6A8885A308D3
    for w in words:
        state = mixed(state ^ mixed(w))
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        yield (mixed(state) >> 11) / 2**53


def eva(rounds=8):
    """A of layer 1 after so many rounds of subspace iteration on what its linears read, and what share that holds of
    what the leading right singular vectors hold. The iteration is numpy's; the random start is src/random.rs's."""
    model, read = base(), {}
    layer = model.model.layers[1]
    modules = [getattr(layer.self_attn, n) for n in LINEARS[:4]] + [getattr(layer.mlp, n) for n in LINEARS[4:]]
    for name, module in zip(LINEARS, modules, strict=True):
        module.register_forward_pre_hook(lambda _, args, name=name: read.setdefault(name, []).append(args[0][0]))
    with torch.no_grad():
        for i in range(STEPS * BATCH):
            model(torch.tensor([row(f"methods/{i}")[:-1]]))
    out, held = {}, {}
    for index, name in enumerate(LINEARS):
        x = torch.cat(read[name])
        numbers = stream(SEED, len(LINEARS) + index)
        a = torch.tensor([2 * next(numbers) - 1 for _ in range(RANK * x.shape[1])], dtype=torch.float64)
        a = a.view(RANK, -1) / x.shape[1] ** 0.5
        for _ in range(rounds):
            q, r = torch.linalg.qr((a @ x.T @ x).T)
            a = (q * r.diagonal().sign()).T
        block = "self_attn" if index < 4 else "mlp"
        site = f"layers.1.{block}.{name}.lora_A"
        out[site] = three(site, a)
        best = torch.linalg.svdvals(x)[:RANK].pow(2).sum()
        held[name] = ((x @ a.T).pow(2).sum() / best).item()
    assert all(share > 0.94 for share in held.values()), held
    return {"held": held, "factors": out}


def frugal(rank=6, width=10, updates=450, part=2, gap=200, lr=0.01, weight_decay=0.01):
    """A factor after so many updates with gradients made of their numbers; a part is 2 of its 6 ranks."""
    p = numbers("frugal", rank * width).view(rank, width).clone()
    for t in range(updates):
        g = numbers(f"frugal/{t}", rank * width).view(rank, width)
        if t % gap == 0:
            turn = t // gap % -(-rank // part)
            block = torch.nn.Parameter(p[turn * part : (turn + 1) * part].clone())
            adam = torch.optim.AdamW([block], lr=lr, weight_decay=weight_decay)
        block.grad = g[turn * part : (turn + 1) * part].clone()
        adam.step()
        p = p * (1 - lr * weight_decay) - lr * torch.sign(g)
        p[turn * part : (turn + 1) * part] = block.detach()
    return [round(x, 9) for x in p.flatten().tolist()]


CURVES = {
    "frozen-a": lambda: curve(adamw, 0.01, frozen=("lora_A",)),
    "frozen-a-dora": lambda: curve(adamw, 0.01, frozen=("lora_A",), dora=True),
    "lion": lambda: curve(Lion, 0.001),
    "adafactor": lambda: curve(adafactor, 0.01),
    "adafactor-dora": lambda: curve(adafactor, 0.01, dora=True),
    "dpo": lambda: curve(adamw, 0.01, loss=lambda m, b: pairs(m, b, False)),
    "ln-dpo": lambda: curve(adamw, 0.01, loss=lambda m, b: pairs(m, b, True)),
    "nested": lambda: curve(adamw, 0.01, nested=True),
    "eva": eva,
    "frugal": frugal,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    made = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, f64"
    print(json.dumps({"made_with": made, **{name: make() for name, make in CURVES.items()}}))
