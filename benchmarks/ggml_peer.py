"""llama.cpp as a peer: ggml's mat-mul on one layer, and whole models through libllama.

Needs the extra `bench` (llama-cpp-python compiles llama.cpp for this machine; gguf quantises and
writes the file). GGUF files are written here, from the same weights the others get.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

TERNARY_TYPES = ("TQ2_0", "TQ1_0")


def available() -> str | None:
    """None, or why the peer cannot run."""
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError as error:
        return f"{error}; pip install '.[bench]'"
    return None


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _Plan(ctypes.Structure):
    _fields_ = [
        ("work_size", ctypes.c_size_t), ("work_data", ctypes.c_void_p), ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p), ("abort_callback", ctypes.c_void_p), ("abort_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    ]  # fmt: skip


class _PoolParams(ctypes.Structure):
    _fields_ = [
        ("cpumask", ctypes.c_bool * 512), ("n_threads", ctypes.c_int), ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32), ("strict_cpu", ctypes.c_bool), ("paused", ctypes.c_bool),
    ]  # fmt: skip


class Ggml:
    """The functions of libggml that a mat-mul takes."""

    def __init__(self) -> None:
        import llama_cpp

        folder = Path(llama_cpp.__file__).parent / "lib"
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        p, i64 = ctypes.c_void_p, ctypes.c_int64
        for name, result, arguments in (
            ("ggml_init", p, [_InitParams]), ("ggml_new_tensor_2d", p, [p, ctypes.c_int, i64, i64]),
            ("ggml_mul_mat", p, [p, p, p]), ("ggml_new_graph", p, [p]), ("ggml_get_data", p, [p]),
            ("ggml_build_forward_expand", None, [p, p]), ("ggml_free", None, [p]),
        ):  # fmt: skip
            function = getattr(self.base, name)
            function.restype, function.argtypes = result, arguments
        for name, result, arguments in (
            ("ggml_graph_plan", _Plan, [p, ctypes.c_int, p]), ("ggml_graph_compute", ctypes.c_int, [p, p]),
            ("ggml_threadpool_new", p, [p]), ("ggml_threadpool_free", None, [p]), ("ggml_cpu_init", None, []),
        ):  # fmt: skip
            function = getattr(self.cpu, name)
            function.restype, function.argtypes = result, arguments
        self.base.ggml_threadpool_params_default.restype = _PoolParams
        self.base.ggml_threadpool_params_default.argtypes = [ctypes.c_int]
        self.cpu.ggml_cpu_init()
        self.pools: dict[int, int] = {}

    def pool(self, threads: int) -> int:
        """One thread pool per thread count, as llama.cpp itself keeps one."""
        if threads not in self.pools:
            params = self.base.ggml_threadpool_params_default(threads)
            self.pools[threads] = self.cpu.ggml_threadpool_new(ctypes.byref(params))
        return self.pools[threads]


class MatMul:
    """y = x W^T for one quantised weight; call(x) with x [batch, K] returns [batch, N] float32."""

    def __init__(self, ggml: Ggml, packed: np.ndarray, type_id: int, n: int, k: int) -> None:
        self.ggml, self.n, self.k = ggml, n, k
        self.context = ggml.base.ggml_init(_InitParams(packed.nbytes + (1 << 20), None, False))
        self.weight = ggml.base.ggml_new_tensor_2d(self.context, type_id, k, n)
        ctypes.memmove(ggml.base.ggml_get_data(self.weight), packed.ctypes.data, packed.nbytes)
        self.graphs: dict[tuple[int, int], tuple[Any, ...]] = {}

    def _graph(self, batch: int, threads: int) -> tuple[Any, ...]:
        if (batch, threads) not in self.graphs:
            g = self.ggml
            context = g.base.ggml_init(_InitParams(4 * batch * (self.n + self.k) + (1 << 20), None, False))
            x = g.base.ggml_new_tensor_2d(context, 0, self.k, batch)
            y = g.base.ggml_mul_mat(context, self.weight, x)
            graph = g.base.ggml_new_graph(context)
            g.base.ggml_build_forward_expand(graph, y)
            plan = g.cpu.ggml_graph_plan(graph, threads, g.pool(threads))
            work = ctypes.create_string_buffer(plan.work_size + 64)
            plan.work_data = (ctypes.addressof(work) + 63) // 64 * 64
            data = g.base.ggml_get_data(x), g.base.ggml_get_data(y)
            self.graphs[batch, threads] = (graph, plan, work, *data)
        return self.graphs[batch, threads]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        graph, plan, _, x_data, y_data = self._graph(x.shape[0], torch.get_num_threads())
        x32 = x.float().contiguous()
        ctypes.memmove(x_data, x32.data_ptr(), x32.nbytes)
        if self.ggml.cpu.ggml_graph_compute(graph, ctypes.byref(plan)) != 0:
            raise RuntimeError("ggml_graph_compute failed")
        out = (ctypes.c_float * (x.shape[0] * self.n)).from_address(y_data)
        return torch.frombuffer(out, dtype=torch.float32).view(x.shape[0], self.n)


def quantised(weight: torch.Tensor, name: str) -> tuple[np.ndarray, int]:
    """The weight in a ggml type, and that type's number. K must divide by 256."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    kind = GGMLQuantizationType[name]
    rows = [quantize(part.float().numpy(), kind) for part in weight.split(1024)]
    return np.ascontiguousarray(np.concatenate(rows)), int(kind)


def write_gguf(model: Path, target: Path, type_name: str) -> None:
    """A random Llama checkpoint in Hugging Face layout as GGUF, projections in one of ggml's types.

    The rows of q and k are not reordered for llama.cpp's rotary layout: speed is what is measured,
    and random weights have no tokens to compare.
    """
    import gguf
    from safetensors import safe_open

    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(2048)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                tensor = shard.get_tensor(name)
                if name in outer:
                    dtype = np.float16 if tensor.dim() == 2 else np.float32
                    writer.add_tensor(outer[name], tensor.float().numpy().astype(dtype))
                    continue
                _, _, layer, rest = name.split(".", 3)
                to = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
                if tensor.dim() == 1:
                    writer.add_tensor(to, tensor.float().numpy())
                else:
                    data, kind = quantised(tensor, type_name)
                    writer.add_tensor(to, data, raw_dtype=gguf.GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_model(path: str, threads: int, batch: int, prompt: int, tokens: int, repeats: int) -> dict[str, list[float]]:
    """Tokens per second of decoding `batch` sequences together, and of prefilling one of `prompt` tokens."""
    import time

    import llama_cpp as lib

    lib.llama_backend_init()
    log: list[bytes] = []
    callback = lib.llama_log_callback(lambda _level, text, _data: log.append(text))  # kept while llama.cpp has it
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp did not load {path}: {b''.join(log[-5:]).decode()}")
    params = lib.llama_context_default_params()
    params.n_ctx = 512 * batch
    params.n_batch = params.n_ubatch = max(prompt, 512)
    params.n_seq_max = batch
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(model, params)
    call = lib.llama_batch_init(max(prompt, batch), 0, batch)

    def decode(entries: list[tuple[int, int, bool]]) -> None:
        """(position, sequence, wants logits) of each token."""
        call.n_tokens = len(entries)
        for i, (position, sequence, logits) in enumerate(entries):
            call.token[i] = 2 + position % 500
            call.pos[i] = position
            call.n_seq_id[i] = 1
            call.seq_id[i][0] = sequence
            call.logits[i] = logits
        if lib.llama_decode(context, call) != 0:
            raise RuntimeError("llama_decode failed")
        lib.llama_synchronize(context)

    memory = lib.llama_get_memory(context)
    out: dict[str, list[float]] = {"decode": [], "prefill": []}
    for _ in range(repeats + 1):
        lib.llama_memory_clear(memory, True)
        start = time.perf_counter()
        decode([(i, 0, i == prompt - 1) for i in range(prompt)])
        out["prefill"].append(prompt / (time.perf_counter() - start))
        lib.llama_memory_clear(memory, True)
        for sequence in range(batch):
            decode([(i, sequence, i == 15) for i in range(16)])
        start = time.perf_counter()
        for step in range(tokens):
            decode([(16 + step, sequence, True) for sequence in range(batch)])
        out["decode"].append(batch * tokens / (time.perf_counter() - start))
    return {name: rates[1:] for name, rates in out.items()}  # the first warmed up


if __name__ == "__main__":
    print(json.dumps(run_model(sys.argv[1], *map(int, sys.argv[2:7]))))
