"""Converts one target from end to end: read, check, round, quantise, digest, write.

Rows are read into memory that stays in the cache and are done with before the next ones are read.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from blake3 import blake3

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import quantized_linear
from llmserve.checkpoint.huggingface import HuggingFaceCheckpoint
from llmserve.checkpoint.scratch import Scratch, bytes_of
from llmserve.checkpoint.writer import StreamingWriter
from llmserve.convert.plain_tensors import not_finite
from llmserve.convert.plan import Target
from llmserve.convert.rank_slices import RankSlices
from llmserve.convert.record import FinishedTarget, relative_error
from llmserve.errors import CheckpointError
from llmserve.quantization import weight_format
from llmserve.quantization.amax import row_amax_of_bits
from llmserve.quantization.layout import checkpoint_tensors, rank_shards
from llmserve.quantization.rowwise import rowwise_format

# Quantises a whole weight in the checkpoint's dtype; returns the stored tensors by suffix.
Quantize = Callable[[Target, torch.Tensor], dict[str, torch.Tensor]]


class Stopped(Exception):
    """The conversion is given up; raised in the threads that are still at work."""


class TargetConversion:
    """What converts the targets of one checkpoint; several threads may, each another target.

    Args:
        checkpoint: The source, open for reading.
        config: Of the result.
        writers: Of each rank's file.
        quantize: For formats that need a weight whole.
        chunk_bytes: Of the source, to work on at once.

    Attributes:
        stopped: Set to True, makes every thread give up.
    """

    def __init__(
        self,
        checkpoint: HuggingFaceCheckpoint,
        config: PretrainedConfig,
        writers: Sequence[StreamingWriter],
        quantize: Quantize | None,
        chunk_bytes: int,
    ) -> None:
        self.stopped = False
        self._checkpoint, self._config, self._writers = checkpoint, config, writers
        self._quantize, self._chunk_bytes = quantize, chunk_bytes
        tensors = checkpoint_tensors(config)
        self._shards = [rank_shards(config, tensors, rank) for rank in range(config.tp_size)]
        algo = config.quantization.quant_algo
        self._format, self._rowwise = weight_format(algo), rowwise_format(algo)
        # TensorRT-LLM's form A: what is stored is plain, and quantised when it is loaded.
        self._stored_plain = algo == "W8A16"
        self._threads = threading.local()
        # One at a time: memory is bounded by the largest weight, whatever the number of threads.
        self._one_whole_weight = threading.Lock()

    def convert(self, target: Target) -> FinishedTarget:
        """Convert and write one target.

        Raises:
            CheckpointError: A source cannot be read, or is not finite, or not in the target's
                dtype.
            OSError: The file system refuses.
            Stopped: Another target failed.
        """
        linear = quantized_linear(self._config, target.name)
        if linear is None or self._rowwise is not None:
            return self._convert_rows(target, linear)
        with self._one_whole_weight:
            return self._convert_whole(target, linear)

    def write_constants(self, tensors: Mapping[str, torch.Tensor]) -> list[dict[str, str]]:
        """Write whole tensors that have no source; returns digests by name for each rank."""
        digests: list[dict[str, str]] = [{} for _ in self._writers]
        for name, tensor in tensors.items():
            for rank, digest in enumerate(self._write_whole(name, tensor)):
                digests[rank][name] = digest
        return digests

    def digest(self, name: str) -> str:
        """The digest of a tensor of the source."""
        hasher = blake3()
        spec = self._checkpoint.spec(name)
        for begin in range(0, spec.nbytes, self._chunk_bytes):
            count = min(self._chunk_bytes, spec.nbytes - begin)
            chunk = self._scratch.tensor("source", (count,), torch.uint8)
            self._checkpoint.read_into(name, begin, chunk)
            hasher.update(bytes_of(chunk))
        return hasher.hexdigest()

    @property
    def _scratch(self) -> Scratch:
        """This thread's."""
        if not hasattr(self._threads, "scratch"):
            self._threads.scratch = Scratch()
        scratch: Scratch = self._threads.scratch
        return scratch

    def _slices(self, name: str, *, digested: bool = True) -> RankSlices:
        shards = [rank[name] for rank in self._shards]
        return RankSlices(name, self._writers, shards, self._scratch, digested=digested)

    def _convert_rows(self, target: Target, linear: str | None) -> FinishedTarget:
        """Convert a target some rows at a time: a plain one, or one of a format that takes rows."""
        stored = None if linear is None or self._stored_plain else linear
        # Where one rank's file has the source's very bytes, one digest is both's.
        copied = stored is None and len(self._writers) == 1 and self._is_copied(target)
        slices = self._slices(f"{stored}.weight" if stored else target.name, digested=not copied)
        source: dict[str, str] = {}
        scales: dict[str, list[torch.Tensor]] = {}
        squared_error = squared_norm = 0.0
        dtype = target.spec.dtype
        if linear is not None:
            dtype = self._format.stored(target.spec.shape, dtype)["weight"].spec.dtype
        place = slices.file_offset if stored is None else None
        for begin, rows, amax in self._chunks(target, source, place, by_row=linear is not None):
            if linear is not None:
                assert self._rowwise is not None
                offset = slices.file_offset() if stored else 0
                out = self._scratch.tensor(
                    "quantized", tuple(rows.shape), dtype, file_offset=offset
                )
                done = self._rowwise.quantize_rows(rows, amax, out, self._scratch)
                squared_error += done.squared_error
                squared_norm += done.squared_norm
                for suffix, scale in done.scales.items():
                    scales.setdefault(suffix, []).append(scale)
                rows = out if stored else rows
            slices.take(rows, begin)
        digests = slices.finish(source[target.sources[0].name] if copied else None)
        result = [{f"{stored}.weight" if stored else target.name: d} for d in digests]
        for suffix, parts in scales.items() if stored else ():
            name = f"{stored}.{suffix}"
            for rank, digest in enumerate(self._write_whole(name, torch.cat(parts))):
                result[rank][name] = digest
        error = None if linear is None else relative_error(squared_error, squared_norm)
        return FinishedTarget(
            target=target.name, source=source, result=result, quantization_error=error
        )

    def _convert_whole(self, target: Target, linear: str) -> FinishedTarget:
        """Convert a target of a format that needs a weight whole."""
        if self._quantize is None:
            algo = self._config.quantization.quant_algo
            raise ValueError(f"{algo} needs a function that quantises a whole weight")
        weight = torch.empty(target.spec.shape, dtype=target.spec.dtype)
        matrix = weight.view(-1, weight.shape[-1])
        source: dict[str, str] = {}
        for begin, rows, _ in self._chunks(target, source, None, by_row=False):
            matrix[begin : begin + len(rows)] = rows
        stored = self._quantize(target, weight)
        result: list[dict[str, str]] = [{} for _ in self._writers]
        for suffix, tensor in stored.items():
            name = f"{linear}.{suffix}"
            for rank, digest in enumerate(self._write_whole(name, tensor)):
                result[rank][name] = digest
        dequantized = self._format.dequantize(stored).view(matrix.shape)
        squared_error = squared_norm = 0.0
        step = self._rows_of(self._chunk_bytes, weight.shape[-1] * weight.element_size())
        for before, after in zip(
            torch.split(matrix, step), torch.split(dequantized, step), strict=True
        ):
            squared_error += float((before - after).norm().double().square())
            squared_norm += float(before.float().norm().double().square())
        return FinishedTarget(
            target=target.name,
            source=source,
            result=result,
            quantization_error=relative_error(squared_error, squared_norm),
        )

    def _write_whole(self, name: str, tensor: torch.Tensor) -> list[str]:
        """Write a whole tensor to every rank that holds some of it; returns each one's digest."""
        vectors = self._shards[0][name].vectors
        slices = self._slices(name)
        slices.take(tensor.contiguous().view(-1, 1 if vectors else tensor.shape[-1]), 0)
        return slices.finish()

    def _is_copied(self, target: Target) -> bool:
        """Whether a target has the very bytes of one tensor of the source."""
        source = target.sources[0]
        return (
            len(target.sources) == 1
            and source.rows is None
            and target.offset == 0
            and self._checkpoint.spec(source.name).dtype == target.spec.dtype
        )

    def _chunks(
        self,
        target: Target,
        digests: dict[str, str],
        file_offset: Callable[[], int] | None,
        *,
        by_row: bool,
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """A target's rows in its dtype, in order, some at a time; all are finite.

        Args:
            target: What to read.
            digests: Given the digest of each tensor of the source that was read.
            file_offset: Where rows will be written if they are written as they are.
            by_row: Whether to give the largest magnitude of each row.

        Yields:
            The first row's number; rows (rows, columns), valid until the next ones are asked for;
            their largest magnitudes, float32 (rows,), or (1,) for all of them.
        """
        columns = target.spec.shape[-1] if len(target.spec.shape) > 1 else 1
        begin = 0
        for source in target.sources:
            spec = self._checkpoint.spec(source.name)
            row_bytes = columns * spec.dtype.itemsize
            start, stop = source.rows or (0, math.prod(spec.shape) // max(columns, 1))
            hasher = blake3()
            step = self._rows_of(self._chunk_bytes, row_bytes)
            for first in range(start, stop, step):
                if self.stopped:
                    raise Stopped
                shape = (min(step, stop - first), columns)
                offset = file_offset() if file_offset is not None else 0
                as_it_is = spec.dtype == target.spec.dtype and not target.offset
                read = self._scratch.tensor(
                    "source", shape, spec.dtype, file_offset=offset if as_it_is else 0
                )
                self._checkpoint.read_into(source.name, first * row_bytes, read)
                hasher.update(bytes_of(read))
                rows = read if as_it_is else self._rounded(read, target, offset)
                amax = row_amax_of_bits(rows if by_row else rows.view(1, -1), self._scratch)
                if not bool(torch.isfinite(amax).all()):
                    sentence = not_finite(self._checkpoint, source.name, read, target.spec.dtype)
                    raise CheckpointError(sentence)
                yield begin, rows, amax
                begin += len(rows)
            if source.rows is None:
                digests[source.name] = hasher.hexdigest()
            elif source.name not in digests:
                # Its rows are taken in another order than they stand in.
                digests[source.name] = self.digest(source.name)

    def _rounded(self, read: torch.Tensor, target: Target, file_offset: int) -> torch.Tensor:
        """Rows of the source in the target's dtype, with its offset."""
        shape = tuple(read.shape)
        if target.offset:
            wide = self._scratch.tensor("wide", shape, torch.float32)
            read = wide.copy_(read).add_(target.offset)
        rows = self._scratch.tensor("rows", shape, target.spec.dtype, file_offset=file_offset)
        return rows.copy_(read)

    @staticmethod
    def _rows_of(num_bytes: int, row_bytes: int) -> int:
        return max(1, num_bytes // max(row_bytes, 1))
