"""Writes a quantised Hugging Face checkpoint: the format of TensorRT-LLM 1.3+, vLLM and SGLang."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from llmserve.checkpoint.companions import QUALITY_FILE
from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.config_file import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, write_json
from llmserve.checkpoint.decoder_tensors import EMBEDDING, quantized_linear, torch_dtype
from llmserve.checkpoint.huggingface import HuggingFaceCheckpoint
from llmserve.checkpoint.progress import Report, no_report
from llmserve.checkpoint.scratch import Scratch, bytes_of
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.checkpoint.writer import StreamingWriter
from llmserve.convert.families.family import Family
from llmserve.convert.hf_layout import (
    KEY_SCALE,
    KV_CACHE_QUANT_ALGOS,
    QUANT_ALGOS,
    QUANT_CONFIG_FILE,
    SUFFIXES,
    VALUE_SCALE,
    Part,
    attention_name,
    hf_parts,
)
from llmserve.convert.plain_tensors import PlainTensors
from llmserve.convert.plan import Source, Target
from llmserve.convert.record import (
    ConversionRecord,
    FileDigests,
    file_digests,
    relative_error,
    source_digests,
)
from llmserve.errors import ConfigError
from llmserve.quantization import weight_format
from llmserve.quantization.amax import row_amax_of_bits
from llmserve.quantization.rowwise import RowwiseFormat, rowwise_format
from llmserve.quantization.scales import symmetric_scale

Quantize = Callable[[Target, torch.Tensor], dict[str, torch.Tensor]]
# As transformers and modelopt split large models: a file holds at most so much.
_SHARD_BYTES = 5 * 10**9
# Rows that are quantised at once: their float32 copies stay small.
_CHUNK_ROWS = 128

# vLLM's words for FP8; for the other two modelopt writes quant_algo alone, which is what is read.
_CONFIG_GROUPS = {
    "FP8": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
            "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
            "targets": ["Linear"],
        }
    }
}


def check_exportable(config: PretrainedConfig) -> None:
    """Check that readers of the format know a quantisation.

    Raises:
        ConfigError: They do not, or there is none.
    """
    quantization = config.quantization
    if quantization.quant_algo is None:
        raise ConfigError(
            "checkpoint_format is 'hf' with quant 'none': the source is such a checkpoint already, "
            "and readers want quantised weights where K and V are; choose quant w8a16, fp8 or "
            "fp8_rowwise"
        )
    if quantization.quant_algo not in QUANT_ALGOS:
        raise ConfigError(
            f"checkpoint_format is 'hf' with {quantization.quant_algo}, which no reader of that "
            f"format implements; it must be one of {', '.join(QUANT_ALGOS)}"
        )
    if quantization.kv_cache_quant_algo not in KV_CACHE_QUANT_ALGOS:
        raise ConfigError(
            f"checkpoint_format is 'hf' with a KV cache in {quantization.kv_cache_quant_algo}, "
            "which no reader of that format implements; it must be auto or fp8"
        )


def export_hf(
    checkpoint: HuggingFaceCheckpoint,
    family: Family,
    plan: Sequence[Target],
    config: PretrainedConfig,
    out_dir: Path,
    *,
    quantize: Quantize,
    kv_amax: Mapping[int, tuple[float, float]] | None = None,
    report: Report = no_report,
) -> None:
    """Write weights, config.json, hf_quant_config.json and the record of it.

    Args:
        checkpoint: The source.
        family: Of the source.
        plan: Of ``make_plan``.
        config: What the result would be as a TensorRT-LLM checkpoint.
        out_dir: An empty directory.
        quantize: The stored tensors, by suffix, of a plain weight; of formats that take one whole.
        kv_amax: Of a quantised KV cache, each layer's largest magnitudes of K and of V.
        report: Told after every weight.

    Raises:
        CheckpointError: The source cannot be read, or is not finite.
        OSError: The file system refuses.
    """
    export = _Export(checkpoint, family, plan, config, quantize, kv_amax or {})
    shards = _shards(export.specs())
    names = [SINGLE_FILE]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    total = sum(spec.nbytes for shard in shards for spec in shard.values())
    done, tensors = 0, export.tensors()
    result: dict[str, FileDigests] = {}
    for file, shard in zip(names, shards, strict=True):
        digests: dict[str, str] = {}
        with StreamingWriter(out_dir / file, shard) as opened:
            for _ in shard:
                name, tensor = next(tensors)
                opened.write(name, tensor)
                digests[name] = blake3(bytes_of(tensor.contiguous())).hexdigest()
                done += tensor.nbytes
                report("convert", done, total)
        result[file] = file_digests(opened.header, opened.names_in_order(), digests)
    if len(shards) > 1:
        where = {name: f for f, shard in zip(names, shards, strict=True) for name in shard}
        write_json(out_dir / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})
    described = _describe(family, config)
    write_json(out_dir / QUANT_CONFIG_FILE, described)
    write_json(out_dir / CONFIG_FILE, _hf_config(checkpoint.config, config, described))
    record = ConversionRecord(
        source=source_digests(checkpoint), result=result, quantization_error=export.errors
    )
    write_json(out_dir / QUALITY_FILE, record.to_dict())


class _Export:
    """The tensors of the result, in the order of the plan.

    Attributes:
        errors: Of each weight that was quantised so far, as in ``ConversionRecord``.
    """

    def __init__(
        self,
        checkpoint: HuggingFaceCheckpoint,
        family: Family,
        plan: Sequence[Target],
        config: PretrainedConfig,
        quantize: Quantize,
        kv_amax: Mapping[int, tuple[float, float]],
    ) -> None:
        self.errors: dict[str, float] = {}
        self._plan, self._config = plan, config
        self._quantize, self._kv_amax = quantize, kv_amax
        self._format = weight_format(config.quantization.quant_algo)
        self._rowwise = rowwise_format(config.quantization.quant_algo)
        self._scratch = Scratch()
        self._dtype = torch_dtype(config.dtype)
        self._parts = hf_parts(family, config)
        pieces = [piece for target in plan for piece in self._pieces(target, checkpoint)]
        self._plain = PlainTensors(checkpoint, pieces)  # by Hugging Face name
        self._whole = PlainTensors(checkpoint, plan)

    def specs(self) -> dict[str, TensorSpec]:
        """Of every tensor, in order."""
        specs: dict[str, TensorSpec] = {}
        for target in self._plan:
            linear = quantized_linear(self._config, target.name)
            for part in self._parts[target.name]:
                spec = self._plain.spec(part.name)
                if linear is None:
                    specs[part.name] = spec
                    continue
                for suffix, (kept, how) in self._format.stored(spec.shape, spec.dtype).items():
                    shape = () if how == "nothing" else kept.shape
                    specs[f"{part.module}.{SUFFIXES[suffix]}"] = TensorSpec(shape, kept.dtype)
        return specs | {name: TensorSpec((), torch.float32) for name, _ in self._kv_scales()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, in the order of ``specs``."""
        for target in self._plan:
            if quantized_linear(self._config, target.name) is None:
                for part in self._parts[target.name]:
                    yield part.name, self._plain.tensor(part.name)
                continue
            for part, stored in self._quantized(target):
                for suffix, tensor in stored.items():
                    yield f"{part.module}.{SUFFIXES[suffix]}", tensor
        yield from self._kv_scales()

    def _quantized(self, target: Target) -> Iterator[tuple[Part, dict[str, torch.Tensor]]]:
        """The stored tensors of each part, by suffix."""
        if self._rowwise is not None:
            # No row knows of another, so that no more than a part is ever held.
            for part in self._parts[target.name]:
                yield part, self._by_rows(part.name, self._rowwise)
            return
        whole = self._quantize(target, self._whole.tensor(target.name))
        for part in self._parts[target.name]:
            stored = {suffix: _of_part(part, tensor) for suffix, tensor in whole.items()}
            squared_error = squared_norm = 0.0
            before = torch.split(self._plain.tensor(part.name), _CHUNK_ROWS)
            for rows, kept in zip(before, torch.split(stored["weight"], _CHUNK_ROWS), strict=True):
                after = self._format.dequantize(stored | {"weight": kept})
                squared_error += float((rows - after).norm().double().square())
                squared_norm += float(rows.float().norm().double().square())
            self.errors[part.name] = relative_error(squared_error, squared_norm)
            yield part, stored

    def _by_rows(self, name: str, rowwise: RowwiseFormat) -> dict[str, torch.Tensor]:
        weight = self._plain.tensor(name)
        stored = self._format.stored(tuple(weight.shape), weight.dtype)
        num_threads = torch.get_num_threads()
        values = torch.empty(weight.shape, dtype=stored["weight"].spec.dtype)
        scales: list[torch.Tensor] = []
        squared_error = squared_norm = 0.0
        chunks = (torch.split(whole, _CHUNK_ROWS) for whole in (weight, values))
        # Operations on what fits into a core's cache are too short to be shared out.
        torch.set_num_threads(1)
        try:
            for rows, out in zip(*chunks, strict=True):
                amax = row_amax_of_bits(rows, self._scratch)
                done = rowwise.quantize_rows(rows, amax, out, self._scratch)
                scales.append(done.scales["per_channel_scale"])
                squared_error += done.squared_error
                squared_norm += done.squared_norm
        finally:
            torch.set_num_threads(num_threads)
        self.errors[name] = relative_error(squared_error, squared_norm)
        return {"weight": values, "per_channel_scale": torch.cat(scales)}

    def _kv_scales(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._config.quantization.kv_cache_quant_algo is None:
            return
        for layer, amax in sorted(self._kv_amax.items()):
            for name, value in zip((KEY_SCALE, VALUE_SCALE), amax, strict=True):
                scale = symmetric_scale(torch.tensor(value), 448.0, self._dtype)
                yield f"{attention_name(layer)}.{name}", scale

    def _pieces(self, target: Target, checkpoint: HuggingFaceCheckpoint) -> Iterator[Target]:
        """Each part as a target by itself, without the offset, which is TensorRT-LLM's."""
        for part in self._parts[target.name]:
            shape = (part.num_rows, *target.spec.shape[1:][-1:])
            yield Target(
                name=part.name,
                spec=TensorSpec(shape, self._dtype),
                sources=tuple(_sources_of(part, target, checkpoint)),
            )


def _sources_of(part: Part, target: Target, checkpoint: HuggingFaceCheckpoint) -> Iterator[Source]:
    """Where a part's rows come from: experts may be stored as one, and are one by one here."""
    for start, stop in part.rows:
        begin = 0
        for source in target.sources:
            shape = checkpoint.spec(source.name).shape
            first, last = source.rows or (0, math.prod(shape[:-1]) if len(shape) > 1 else shape[0])
            end = begin + last - first
            low, high = max(start, begin), min(stop, end)
            if low < high:
                rows = (first + low - begin, first + high - begin)
                yield Source(name=source.name, rows=rows)
            begin = end


def _of_part(part: Part, tensor: torch.Tensor) -> torch.Tensor:
    """What of a stored tensor of FP8 is a part's: rows of the weight, or its one scale."""
    if tensor.dtype != torch.float8_e4m3fn:
        values = tensor.reshape(-1)  # one, or one for each expert
        return values[part.expert if len(values) > 1 else 0].clone()
    matrix = tensor.reshape(-1, tensor.shape[-1])
    found = [matrix[start:stop] for start, stop in part.rows]
    return found[0] if len(found) == 1 else torch.cat(found)


def _shards(specs: Mapping[str, TensorSpec]) -> list[dict[str, TensorSpec]]:
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if size + spec.nbytes > _SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    return shards


def _describe(family: Family, config: PretrainedConfig) -> dict[str, Any]:
    """hf_quant_config.json."""
    parts = hf_parts(family, config)
    routers = [part.module for name in parts if ".router." in name for part in parts[name]]
    (embedding,) = parts[EMBEDDING]
    return {
        "producer": {"name": "llmserve", "version": version("llmserve")},
        "quantization": {
            "quant_algo": config.quantization.quant_algo,
            "kv_cache_quant_algo": config.quantization.kv_cache_quant_algo,
            # Tied models have no lm_head of their own, and readers look for its name all the same.
            "exclude_modules": sorted(["lm_head", embedding.module, *routers]),
        },
    }


def _hf_config(
    source: Mapping[str, Any], config: PretrainedConfig, described: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json: the source's, with what hf_quant_config.json says in vLLM's words."""
    result = dict(source)
    for key in {"dtype", "torch_dtype"} & result.keys() or {"torch_dtype"}:
        result[key] = config.dtype
    quantization, said = described["quantization"], dict[str, Any]()
    if groups := _CONFIG_GROUPS.get(quantization["quant_algo"]):
        said["config_groups"] = groups
    said["ignore"] = quantization["exclude_modules"]
    if quantization["quant_algo"]:
        said["quant_algo"] = quantization["quant_algo"]
    if quantization["kv_cache_quant_algo"]:
        said["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    said |= {"producer": described["producer"], "quant_method": "modelopt"}
    return result | {"quantization_config": said}
