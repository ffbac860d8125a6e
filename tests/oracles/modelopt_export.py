"""NVIDIA's quantiser, run in a virtual environment of its own: it wants transformers below 5.

Takes a JSON list of jobs ``{"source", "out", "decoder_type", "quant", "kv_cache", "dtype", "tp",
"alpha", "seed"}`` on stdin and exports each Hugging Face checkpoint ``source`` as a TensorRT-LLM
checkpoint ``out``. Formats that need it are calibrated on random tokens, and the ranges that
modelopt found are left in ``out``'s ``activation_ranges.safetensors``, by the names that
``llmserve convert --calib`` reads. It imports nothing of llmserve.
"""

import copy
import json
import sys
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_tensorrt_llm_checkpoint
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

_CONFIGS = {
    "none": {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"},
    "fp8_rowwise": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "int8_sq": mtq.INT8_SMOOTHQUANT_CFG,
}
_KV_BITS = {"fp8": (4, 3), "int8": 8}
_SEQUENCES, _TOKENS = 4, 48


def main() -> None:
    for job in json.load(sys.stdin):
        _export(job)


def _export(job: dict[str, Any]) -> None:
    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        job["source"], dtype=dtype, attn_implementation="eager"
    )
    ranges = {}
    if job["quant"] != "none" or job["kv_cache"] != "auto":
        model = mtq.quantize(model, _config(job), lambda m: _calibrate(m, job["seed"]))
        if job["quant"] in ("fp8", "int8_sq") or job["kv_cache"] != "auto":
            ranges = _ranges(model)
    export_tensorrt_llm_checkpoint(
        *(model, job["decoder_type"], dtype),
        export_dir=job["out"],
        inference_tensor_parallel=job["tp"],
    )
    if ranges:
        save_file(ranges, f"{job['out']}/activation_ranges.safetensors")


def _config(job: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(_CONFIGS[job["quant"]])
    if job["kv_cache"] != "auto":
        cache = {"num_bits": _KV_BITS[job["kv_cache"]]}
        config["quant_cfg"].append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": cache})
    if job["quant"] == "int8_sq":
        config["algorithm"] = {"method": "smoothquant", "alpha": job["alpha"]}
    return config


def _calibrate(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (_SEQUENCES, _TOKENS)
    model(torch.randint(model.config.vocab_size, shape, generator=generator))


def _ranges(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The largest magnitude of each linear's input channels, and of K and V."""
    ranges: dict[str, torch.Tensor] = {}
    keys, values = [], []
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        experts = getattr(getattr(layer, "block_sparse_moe", None), "experts", None)
        linears = {
            "attention.qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
            "attention.dense": [attention.o_proj],
        }
        if experts is not None:
            linears["mlp.fc"] = [getattr(e, name) for e in experts for name in ("w1", "w3")]
            linears["mlp.proj"] = [e.w2 for e in experts]
        else:
            linears["mlp.fc"], linears["mlp.gate"] = [layer.mlp.gate_proj], [layer.mlp.up_proj]
            linears["mlp.proj"] = [layer.mlp.down_proj]
        for name, modules in linears.items():
            amax = torch.stack([_input_amax(module) for module in modules]).amax(0)
            ranges[f"transformer.layers.{index}.{name}.input_amax"] = amax
        keys.append(_amax(attention, "k_bmm_quantizer"))
        values.append(_amax(attention, "v_bmm_quantizer"))
    ranges["keys"], ranges["values"] = torch.stack(keys), torch.stack(values)
    ranges["qkv_outputs"] = torch.zeros(len(keys), 3)
    return ranges


def _input_amax(module: torch.nn.Module) -> torch.Tensor:
    quantizer = module.input_quantizer
    # SmoothQuant has per-channel ranges, and then one of the smoothed inputs.
    amax = getattr(quantizer, "_amax_for_smoothing", None)
    if amax is None:
        amax = quantizer.amax
    if amax is None:  # an expert that no token went to, or inputs that are not quantised
        amax = torch.zeros(())
    return amax.float().reshape(-1).expand(module.weight.shape[1]).clone()


def _amax(module: torch.nn.Module, quantizer: str) -> torch.Tensor:
    amax = getattr(getattr(module, quantizer, None), "amax", None)
    return torch.zeros(()) if amax is None else amax.float().reshape(())


if __name__ == "__main__":
    main()
