#!/usr/bin/env python3
"""How well merges keep what their sources learned: held-out loss and exact match of each task (not part of build or tests).

Needs torch, transformers and peft in the running Python, and a polylora server of the demo model, which only tokenises:

    python benches/merge_quality.py --gguf ~/.cache/polylora/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --task pirate=pirate.jsonl --task ticket=ticket.jsonl svd=merged/svd lego=merged/lego

Tasks are chat examples, one JSON object with `messages` a line. Loss is the mean over answer tokens; an answer counts as exact when every one of
its tokens is the most likely one after the right ones before it, which is what greedy decoding needs. One JSON line for the base and each adapter.
"""
import argparse
import json
import warnings

import peft
import torch

from merge_in_peft import ask, base


def examples(url, path, count):
    """(tokens, length of the prompt) of each conversation."""
    out = []
    for line in open(path).read().splitlines()[:count]:
        messages = json.loads(line)["messages"]
        prompt = {"messages": messages[:-1], "add_generation_prompt": True}
        whole = {"messages": messages, "add_generation_prompt": False}
        prompt, whole = (ask(url, "/tokenize", b)["tokens"] for b in (prompt, whole))
        assert whole[:len(prompt)] == prompt
        out.append((whole[:-1], len(prompt)))  # the template ends with a line break
    return out


def judge(model, tasks):
    out = {}
    for name, conversations in tasks.items():
        losses, exact, tokens = 0.0, 0, 0
        for ids, start in conversations:
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0, start - 1:-1].log_softmax(-1)
            answer = torch.tensor(ids[start:])
            losses -= logits.gather(1, answer[:, None]).sum().item()
            tokens += len(answer)
            exact += bool((logits.argmax(-1) == answer).all())
        out[name] = {"loss": round(losses / tokens, 4), "exact": round(exact / len(conversations), 3)}
    return out


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--gguf", required=True)
    p.add_argument("--url", default="http://127.0.0.1:8080")
    p.add_argument("--task", action="append", required=True, metavar="NAME=FILE")
    p.add_argument("--count", type=int, default=32, help="examples of each task")
    p.add_argument("adapters", nargs="+", metavar="NAME=DIR")
    a = p.parse_args()
    tasks = {n: examples(a.url, f, a.count) for n, f in (t.split("=", 1) for t in a.task)}
    warnings.filterwarnings("error", message=".*missing adapter keys.*")
    model = base(a.gguf)
    print(json.dumps({"adapter": "base", **judge(model, tasks)}), flush=True)
    for i, (name, folder) in enumerate(x.split("=", 1) for x in a.adapters):
        if i == 0:
            model = peft.PeftModel.from_pretrained(model, folder, adapter_name=name).eval()
        else:
            model.load_adapter(folder, adapter_name=name)
        model.set_adapter(name)
        print(json.dumps({"adapter": name, **judge(model, tasks)}), flush=True)


if __name__ == "__main__":
    main()
