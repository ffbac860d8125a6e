"""NVIDIA's exporter of quantised Hugging Face checkpoints, in a virtual environment of its own.

Takes a JSON list of jobs on stdin. Each quantises the checkpoint ``source``, calibrated on the
sequences ``tokens``, by modelopt's configuration of the name ``config`` and, where ``fp8_kv`` is
true, with K and V in FP8; with ``one_scale``, what readers compute as one linear gets one scale, by
the function that modelopt has for that and leaves out for FP8. It is exported to ``out``, and the
ranges of activations go to the file ``ranges``. Nothing of llmserve is imported.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.quant_utils import preprocess_linear_fusion
from transformers import AutoModelForCausalLM

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def main() -> None:
    for job in json.load(sys.stdin):
        _export(job)


@torch.no_grad()
def _export(job: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype="auto").eval()
    config = copy.deepcopy(getattr(mtq, job["config"]))
    if job["fp8_kv"]:
        config = mtq.update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])

    def run(model: torch.nn.Module) -> None:
        for sequence in job["tokens"]:
            model(torch.tensor([sequence]))

    model = mtq.quantize(model, config, run)
    if job["one_scale"]:
        for module in model.modules():
            for names in _TOGETHER:
                if all(hasattr(module, name) for name in names):
                    preprocess_linear_fusion([getattr(module, name) for name in names])
    ranges = {}
    for name, module in model.named_modules():
        if name.endswith(("input_quantizer", "_bmm_quantizer")):
            amax = getattr(module, "amax", None)
            if module.is_enabled and amax is not None:
                ranges[name] = float(amax)
    Path(job["ranges"]).write_text(json.dumps(ranges))
    export_hf_checkpoint(model, export_dir=job["out"])


if __name__ == "__main__":
    main()
