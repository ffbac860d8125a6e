"""W8A8_SQ_PER_CHANNEL: SmoothQuant. int8 weights and activations, channels balanced beforehand.

Input channels whose activations are large are made smaller and their weights larger by the same
factor, so that 8 bits serve both (Xiao et al. 2023, https://arxiv.org/abs/2211.10438). For input
channel j

    prequant_scaling_factor[j] = max|W[:, j]| ** (1 - alpha) / max|x[j]| ** alpha

brought into [1e-4, 1e4]; inputs are multiplied with it, weights divided by it, then quantised with
one scale per output channel, the inputs with one for all of them. ``smoothquant_val`` is alpha, in
TensorRT-LLM's sense and in nvidia-modelopt's: 1 gives all channels the same range of activations
and leaves their differences to the weights, 0 the other way round. TensorRT-LLM's default is 0.5;
modelopt's, and so that of NVIDIA's quantize.py, is 1.

Given the same ranges and alpha the tensors equal those that modelopt 0.47 exports, with one
exception: for alpha below 1 it finds the factors of q, k and v each by itself and takes their mean,
while here, as in TensorRT-LLM's convert_checkpoint.py, qkv is one weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.errors import UnsupportedCheckpointError
from llmserve.quantization import Stored
from llmserve.quantization.amax import row_amax
from llmserve.quantization.scales import symmetric_scale

CALIBRATED = True
ROWWISE = False

_MAX = 127.0
_MIN_FACTOR, _MAX_FACTOR = 1e-4, 1e4
_NO_RANGE = 2.0**-31  # a channel whose activations never exceed this is left as it is


def quantize(
    weight: torch.Tensor,
    input_amax: torch.Tensor | None = None,
    smoothquant_val: float = 0.5,
    weight_amax: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Quantise to ``weight`` int8 (out, in), its scales and the inputs'.

    ``weights_scaling_factor`` is float32 (out,), ``activation_scaling_factor`` float32 (1,),
    ``prequant_scaling_factor`` (in,) in the weight's dtype.
    """
    if input_amax is None:
        raise ValueError("W8A8_SQ_PER_CHANNEL needs the range of the linear's inputs")
    _check_no_experts(tuple(weight.shape))
    row_amax(weight)  # refuses NaN and infinity
    dtype, input_amax = weight.dtype, input_amax.float()
    factor = _smoothing(weight, input_amax, smoothquant_val)
    # Rounded to the model's dtype on the way, as modelopt does: its bytes depend on it.
    smoothed = (weight * (1.0 / factor)).to(dtype)
    scale = symmetric_scale(row_amax(smoothed), _MAX, dtype)
    q = torch.div(smoothed, scale[:, None]).round_().clamp_(-128, 127).to(torch.int8)
    largest = (input_amax.to(dtype) * factor).amax().to(dtype)
    return {
        "weight": q,
        "weights_scaling_factor": scale,
        "activation_scaling_factor": symmetric_scale(largest.reshape(1), _MAX, dtype),
        "prequant_scaling_factor": factor.to(dtype),
    }


def dequantize(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The float32 weight (out, in) that inputs see, the factors that they go through included."""
    weight = tensors["weight"].float() * tensors["weights_scaling_factor"][:, None]
    return weight * tensors["prequant_scaling_factor"].float()


def stored(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Stored]:
    """An int8 weight, float32 scales of its rows and of the inputs, and factors of its columns.

    Raises:
        UnsupportedCheckpointError: The weight is one of experts.
    """
    _check_no_experts(shape)
    return {
        "weight": Stored(TensorSpec(shape, torch.int8), "weight"),
        "weights_scaling_factor": Stored(TensorSpec(shape[:1], torch.float32), "rows"),
        "activation_scaling_factor": Stored(TensorSpec((1,), torch.float32), "nothing"),
        "prequant_scaling_factor": Stored(TensorSpec(shape[1:], dtype), "columns"),
    }


def _smoothing(weight: torch.Tensor, input_amax: torch.Tensor, alpha: float) -> torch.Tensor:
    """What each input channel is multiplied with, float32 (in,)."""
    low, high = torch.aminmax(weight, dim=0)
    weight_amax = torch.maximum(-low, high)
    factor = weight_amax.pow(1 - alpha) / input_amax.pow(alpha)
    factor = factor.nan_to_num_(nan=1.0, posinf=torch.inf)  # 0 / 0: nothing to balance
    # modelopt's condition: without a vanishing factor, channels without a range get the largest.
    if float(factor.min()) <= _NO_RANGE:
        factor = torch.where(input_amax <= _NO_RANGE, 1.0, factor)
    return factor.clamp_(_MIN_FACTOR, _MAX_FACTOR)


def _check_no_experts(shape: tuple[int, ...]) -> None:
    if len(shape) != 2:
        raise UnsupportedCheckpointError(
            "W8A8_SQ_PER_CHANNEL is not implemented for mixtures of experts: TensorRT-LLM has no "
            "form of it for them; use FP8, FP8_PER_CHANNEL_PER_TOKEN or W8A16"
        )
