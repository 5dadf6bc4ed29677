"""Makes sampler.json: what transformers' logits processors leave of random logits.

Run beside the file with torch and transformers installed: python3 sampler.py
"""

import json
import os

import torch
import transformers
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 40
# temperature, top_k, top_p, min_p, repetition_penalty
CASES = [
    (1.0, 0, 1.0, 0.0, 1.0),
    (0.7, 0, 1.0, 0.0, 1.0),
    (1.3, 5, 1.0, 0.0, 1.0),
    (1.0, 0, 0.6, 0.0, 1.0),
    (1.0, 0, 1.0, 0.2, 1.0),
    (1.5, 12, 0.7, 0.1, 1.0),
    (1.0, 0, 1.0, 0.0, 1.4),
    (0.8, 20, 0.9, 0.05, 1.2),
    (2.0, 0, 0.95, 0.0, 0.8),
    (1.0, 1, 0.5, 0.5, 1.0),
]


def case(temperature, top_k, top_p, min_p, repetition_penalty):
    logits = torch.round(torch.randn(1, VOCAB) * 3 * 1024) / 1024
    history = torch.randint(0, VOCAB, (1, 15))
    left = logits.clone()
    if repetition_penalty != 1.0:
        left = RepetitionPenaltyLogitsProcessor(repetition_penalty)(history, left)
    if temperature != 1.0:
        left = TemperatureLogitsWarper(temperature)(history, left)
    if top_k:
        left = TopKLogitsWarper(top_k)(history, left)
    if top_p < 1.0:
        left = TopPLogitsWarper(top_p)(history, left)
    if min_p > 0.0:
        left = MinPLogitsWarper(min_p)(history, left)
    probabilities = torch.softmax(left.double(), -1)[0].tolist()
    logprobs = torch.log_softmax(logits.double(), -1)[0].tolist()
    return {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "logits": logits[0].tolist(),
        "history": history[0].tolist(),
        "probabilities": [round(p, 9) for p in probabilities],
        "logprobs": [round(p, 6) for p in logprobs],
    }


torch.manual_seed(1)
golden = {
    "made_with": f"transformers {transformers.__version__}, torch {torch.__version__}",
    "cases": [case(*c) for c in CASES],
}
path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sampler.json")
with open(path, "w") as out:
    json.dump(golden, out, separators=(",", ":"))
    out.write("\n")
