"""transformers as the reference: greedy tokens, logits and perplexity of a checkpoint, on the CPU.

BitNet layers are torch.compile'd in transformers; here they run eager, which is the same arithmetic.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch

# Fixed before the first run.
PROMPTS = [
    "def read(path):\n    ",
    "import os\nimport sys\n\n",
    "class Queue:\n    def __init__(self",
    "for i in range(",
    "    if not isinstance(value, ",
    "try:\n    import ",
    '    """Return the ',
    "@property\ndef name(self):\n    return ",
]
HELD_OUT = ("bisect", "shelve", "textwrap")


def tokenizer(model: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model / "tokenizer.json"))


def windows(model: Path, length: int = 256) -> list[list[int]]:
    """Held-out modules of the running interpreter, cut into windows that begin with token 0."""
    text = ""
    for name in HELD_OUT:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        text += Path(spec.origin).read_text()
    ids = tokenizer(model).encode(text).ids
    return [[0, *ids[i : i + length - 1]] for i in range(0, len(ids) - 1, length - 1)]


class Reference:
    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """[tokens, vocabulary] float32."""
        with torch._dynamo.config.patch(disable=True):
            return self.model(torch.tensor([ids])).logits[0].float()

    @torch.no_grad()
    def greedy(self, ids: list[int], count: int) -> tuple[list[int], list[float]]:
        """Tokens, and by how much each was ahead of the second, in log-probability."""
        ids, out, gaps = list(ids), [], []
        for _ in range(count):
            top = self.logits(ids)[-1].log_softmax(-1).topk(2)
            out.append(int(top.indices[0]))
            gaps.append(float(top.values[0] - top.values[1]))
            ids.append(out[-1])
        return out, gaps

    def perplexity(self, texts: list[list[int]]) -> float:
        total, count = 0.0, 0
        for ids in texts:
            scores = self.logits(ids).log_softmax(-1)
            total -= float(scores[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum())
            count += len(ids) - 1
        return math.exp(total / count)
