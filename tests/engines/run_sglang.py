"""Runs in SGLang's environment: `python run_sglang.py jobs.json results.json`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def check_kernels() -> None:
    """The wheel built against vLLM's torch, on SGLang's."""
    import torch

    import sparse_backend as sb
    from sparse_backend.formats import naive_linear

    weight = torch.randn(33, 130).masked_fill_(torch.rand(33, 130) < 0.5, 0).bfloat16()
    packed = sb.pack(weight)
    x = torch.randn(3, 130).bfloat16()
    assert torch.allclose(sb.linear(x, packed).double(), naive_linear(x, packed), rtol=1e-2, atol=1e-2)
    arguments = (x, packed.lower().tensors["packed"], None, 33)
    torch.library.opcheck(torch.ops.sparse_backend.bitmask_linear.default, arguments)


def main() -> None:
    os.environ.setdefault("SGLANG_PLATFORM", "sparse_cpu")
    import sglang

    check_kernels()
    results = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        engine = sglang.Engine(
            model_path=job["model"], device="cpu", dtype="bfloat16", mem_fraction_static=0.3, max_total_tokens=4096,
            log_level="info", **job.get("args", {}),
        )  # fmt: skip
        sampling = {"temperature": 0, "max_new_tokens": job["max_tokens"], "ignore_eos": True}
        outputs = engine.generate(job["prompts"], sampling)
        results.append({"tokens": [o["output_ids"] for o in outputs]})
        engine.shutdown()
    part = Path(sys.argv[2]).with_suffix(".part")
    part.write_text(json.dumps(results))
    part.rename(sys.argv[2])


if __name__ == "__main__":
    main()
