"""NVIDIA's quantiser, run in a virtual environment of its own: it wants transformers below 5.

Takes a JSON list of jobs ``{"source", "out", "quant", "dtype"}`` on stdin and exports each Hugging
Face checkpoint ``source`` as a TensorRT-LLM checkpoint ``out``. It imports nothing of llmserve.
"""

import json
import sys

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_tensorrt_llm_checkpoint
from transformers import LlamaForCausalLM

_CONFIGS = {"fp8_rowwise": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG}


def main() -> None:
    for job in json.load(sys.stdin):
        dtype = getattr(torch, job["dtype"])
        model = LlamaForCausalLM.from_pretrained(job["source"], dtype=dtype)
        if job["quant"] != "none":
            model = mtq.quantize(model, _CONFIGS[job["quant"]])
        export_tensorrt_llm_checkpoint(
            model, "llama", dtype, export_dir=job["out"], inference_tensor_parallel=1
        )


if __name__ == "__main__":
    main()
