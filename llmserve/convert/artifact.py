"""Any artefact as a model to run: whatever is on disk, seen as the engine tensors of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.config_file import (
    CONFIG_FILE,
    KIND_NAMES,
    artifact_kind,
    read_json_object,
)
from llmserve.checkpoint.decoder_tensors import tied_without_lm_head
from llmserve.checkpoint.engine_dir import rank_files, read_engine
from llmserve.checkpoint.huggingface import HuggingFaceCheckpoint
from llmserve.checkpoint.reader import RankReader
from llmserve.checkpoint.tensor_source import TensorSource
from llmserve.config import ConvertConfig
from llmserve.convert.calibrate import single_rank
from llmserve.convert.families import family
from llmserve.convert.import_hf import ImportedTensors, quantization_of
from llmserve.convert.plain_tensors import PlainTensors
from llmserve.convert.plan import make_plan
from llmserve.convert.target_config import target_config
from llmserve.errors import UnsupportedCheckpointError
from llmserve.quantization.engine_view import EngineTensors
from llmserve.quantization.unsharded import UnshardedTensors


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model that can be run.

    Attributes:
        source: The engine tensors of the whole model.
        config: Its config.json, of one rank.
    """

    source: TensorSource
    config: PretrainedConfig

    @property
    def weights(self) -> str:
        """What the weights are, e.g. 'bfloat16', 'FP8', 'W8A16 + INT8 KV'."""
        quantization = self.config.quantization
        weights = quantization.quant_algo or self.config.dtype
        cache = quantization.kv_cache_quant_algo
        return f"{weights} + {cache} KV" if cache else weights


@contextmanager
def open_artifact(path: Path) -> Iterator[Artifact]:
    """Open a Hugging Face checkpoint, a TensorRT-LLM checkpoint or a native engine.

    Ranks are put together. W8A16 weights of a checkpoint of several ranks are quantised as one,
    where its engine quantises each rank's share by itself.

    Raises:
        CheckpointNotFoundError: There is no such directory, or a file of it is missing.
        CheckpointError: It cannot be read.
        UnsupportedCheckpointError: An engine of TensorRT-LLM itself, or a W8A16 engine of several
            ranks.
    """
    path = path.expanduser()
    kind = artifact_kind(path)
    with ExitStack() as stack:
        if kind == "huggingface":
            checkpoint = stack.enter_context(HuggingFaceCheckpoint(path))
            config, rules = target_config(checkpoint, ConvertConfig()), family(checkpoint.config)
            quantization = quantization_of(path)
            if quantization is None:
                plan = make_plan(checkpoint, rules, config)
                yield Artifact(PlainTensors(checkpoint, plan), config)
            else:
                imported = ImportedTensors(checkpoint, rules, config, quantization)
                yield Artifact(imported, config)
            return
        if kind == "tensorrt_llm_engine":
            raise UnsupportedCheckpointError(
                f"{path} is {KIND_NAMES[kind]}; name the checkpoint that it was built from"
            )
        if kind == "engine":
            config, _ = read_engine(path)
        else:
            config = PretrainedConfig.from_dict(read_json_object(path / CONFIG_FILE))
        readers = [stack.enter_context(RankReader(file)) for file in rank_files(path, config)]
        config = tied_without_lm_head(config, readers[0].names())
        in_one = single_rank(config)
        if kind == "engine" and config.tp_size > 1 and config.quantization.quant_algo == "W8A16":
            raise UnsupportedCheckpointError(
                f"{path} is a W8A16 engine of {config.tp_size} ranks, each with scales of its own; "
                "name the checkpoint that it was built from"
            )
        whole: TensorSource = readers[0]
        if config.tp_size > 1:
            whole = UnshardedTensors(readers, config)
        yield Artifact(EngineTensors(whole, in_one) if kind == "checkpoint" else whole, in_one)
