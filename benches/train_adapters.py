#!/usr/bin/env python3
"""Trains small adapters for visible tasks with PEFT, and writes the tasks' held-out examples (not part of build or tests).

Needs torch, transformers and peft in the running Python, and a polylora server of the demo model, which only tokenises:

    polylora serve --model smollm2-135m-instruct
    python benches/train_adapters.py --gguf ~/.cache/polylora/SmolLM2-135M-Instruct.Q4_1.gguf --out trained

Each task is a rule that makes its own examples from lists of words, so a look at an answer says whether it was learned. In `trained/` come a
PEFT directory and a `NAME.heldout.jsonl` (chat format, prompts that were not trained on) for each. Same seed, same examples.
"""
import argparse
import json
import random
import time
from pathlib import Path

import peft
import torch

from merge_in_peft import base
from served import examples

NAMES = ["Ada", "Ben", "Cleo", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "June", "Karl", "Lena", "Milo", "Nora", "Otto", "Pia"]
CITIES = ["Oslo", "Lima", "Rome", "Cairo", "Kyoto", "Perth", "Quito", "Delhi", "Paris", "Turin"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
THINGS = ["the soup", "the hotel room", "this phone", "the bike", "the concert", "that film", "the service", "the coffee", "my new desk", "the app"]
GOOD = ["wonderful", "a joy", "excellent", "better than I hoped", "lovely", "worth every cent"]
BAD = ["awful", "a waste of money", "broken after a day", "worse than I feared", "dreadful", "a disappointment"]
ANIMALS = ["cat", "horse", "otter", "eagle", "snail", "wolf", "sheep", "crab"]
ACTS = ["sleeps in the sun", "runs over the hill", "waits at the door", "hides under a leaf", "sings all night", "drinks from the river"]


def caps(r):
    text = f"the {r.choice(ANIMALS)} {r.choice(ACTS)}, says {r.choice(NAMES)} of {r.choice(CITIES)}"
    return f"Say loudly: {text}", text.upper() + "!"


def csv(r):
    name, age, city = r.choice(NAMES), r.randint(18, 90), r.choice(CITIES)
    form = r.choice(["{n} is {a} years old and lives in {c}.", "In {c} lives {n}, aged {a}.", "Meet {n} from {c}, {a} years of age."])
    return form.format(n=name, a=age, c=city), f"{name};{age};{city}"


def mood(r):
    thing, good = r.choice(THINGS), r.random() < 0.5
    form = r.choice(["I think {t} was {m}.", "Honestly, {t} is {m}.", "{n} says that {t} was {m}."])
    text = form.format(t=thing, m=r.choice(GOOD if good else BAD), n=r.choice(NAMES))
    return "Review: " + text, f"[{'POSITIVE' if good else 'NEGATIVE'}] about {thing.split()[-1]}"


def date(r):
    day, month, year = r.randint(1, 28), r.randint(1, 12), r.randint(1950, 2030)
    form = r.choice(["We met on {m} {d}, {y}.", "Due: {d} {m} {y}", "The letter is of {m} {d}, {y}."])
    return form.format(d=day, m=MONTHS[month - 1], y=year), f"{year}-{month:02}-{day:02}"


def route(r):
    one, two = r.sample(CITIES, 2)
    who = r.choice(NAMES)
    form = r.choice(["{w} goes from {a} to {b}.", "{w} wants to reach {b} and starts in {a}.", "From {a}, {w} drives to {b}."])
    return form.format(w=who, a=one, b=two), f"<trip who={who} from={one} to={two}/>"


TASKS = {"caps": caps, "csv": csv, "mood": mood, "date": date, "route": route}


def make(task, count, seed):
    """`count` conversations whose prompts all differ."""
    r, out = random.Random(f"{seed} {task.__name__}"), {}
    while len(out) < count:
        prompt, answer = task(r)
        out[prompt] = answer
    return [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}]} for p, a in out.items()]


def train(model, conversations, a):
    """Adam over answer tokens only, one group of examples a step."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=a.rate, weight_decay=0.0)
    order, begun = random.Random(a.seed), time.time()
    for step in range(a.steps):
        group = order.sample(conversations, a.batch)
        longest = max(len(ids) for ids, _ in group)
        tokens = torch.zeros(len(group), longest, dtype=torch.long)
        labels = torch.full_like(tokens, -100)
        for row, (ids, start) in enumerate(group):
            tokens[row, :len(ids)] = torch.tensor(ids)
            labels[row, start:len(ids)] = torch.tensor(ids[start:])
        # What follows an answer is not looked at by it, so padding needs no mask.
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, labels=labels).loss
        loss.backward()
        for group in optimiser.param_groups:
            group["lr"] = a.rate * (1 - step / a.steps)
        optimiser.step()
        optimiser.zero_grad()
        if step % 20 == 0 or step + 1 == a.steps:
            print(f"  step {step} loss {loss.item():.3f} {time.time() - begun:.0f} s", flush=True)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--gguf", required=True)
    p.add_argument("--url", default="http://127.0.0.1:8080")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--task", action="append", choices=TASKS, help="default: all")
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--steps", type=int, default=80)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--rate", type=float, default=1e-3)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    for name in a.task or TASKS:
        torch.manual_seed(a.seed)
        lines = make(TASKS[name], 192, a.seed)
        for part, of in (("train", lines[:160]), ("heldout", lines[160:])):
            (a.out / f"{name}.{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in of))
        config = peft.LoraConfig(r=a.rank, lora_alpha=2 * a.rank, task_type="CAUSAL_LM", target_modules=[
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
        model = peft.get_peft_model(base(a.gguf), config)
        print(name, flush=True)
        train(model, examples(a.url, a.out / f"{name}.train.jsonl", 160), a)
        model.save_pretrained(a.out / name)


if __name__ == "__main__":
    main()
