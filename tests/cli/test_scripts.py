"""TensorRT-LLM's flags: honoured, neutral, or refused by name; never ignored."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llmserve.checkpoint.engine_dir import read_engine
from llmserve.config import BuildConfig
from tests.models import make_llama

_SCRIPTS = Path(__file__).parents[2] / "scripts"
# The flags of TensorRT-LLM 1.2's own scripts, each with a value that means its default.
_CONVERT = (
    "--tp_size 1 --pp_size 1 --cp_size 1 --workers 1 --moe_tp_size -1 --moe_ep_size -1 "
    "--dtype auto --group_size 128 --weight_only_precision int8 --calib_dataset "
    "ccdv/cnn_dailymail --calib_size 512 --calib_max_seq_length 512 --log_level info "
    "--embedding_sharding_dim 0 --load_by_shard --load_model_on_cpu"
)
_QUANTIZE = (
    "--device cuda --dtype auto --qformat full_prec --batch_size 1 --awq_block_size 128 "
    "--calib_dataset cnn_dailymail --calib_size 512 --calib_max_seq_length 512 "
    "--tokenizer_max_seq_length 2048 --seed 1234 --tp_size 1 --pp_size 1 --cp_size 1"
)
_BUILD = (
    "--max_batch_size 2048 --max_input_len 1024 --max_beam_width 1 --max_num_tokens 8192 "
    "--kv_cache_type paged --tokens_per_block 32 --output_timing_cache model.cache "
    "--profiling_verbosity layer_names_only --workers 1 --log_level info --max_lora_rank 64 "
    "--max_draft_len 0 --gpt_attention_plugin auto --gemm_plugin disable --nccl_plugin auto "
    "--context_fmha enable --remove_input_padding enable --use_paged_context_fmha enable "
    "--use_fp8_context_fmha disable --multiple_profiles disable --reduce_fusion disable"
)
_REFUSED = {
    "convert_checkpoint": [
        *("--pp_size 2", "--cp_size 2", "--moe_tp_size 4", "--moe_ep_size 4"),
        *("--workers 2", "--weight_only_precision int4_awq", "--group_size 64"),
        *("--embedding_sharding_dim 1", "--log_level debug", "--per_token", "--save_config_only"),
        "--use_meta_fp8_rowwise_recipe",
    ],
    "quantize": [
        *("--qformat int4_awq", "--qformat w4a8_awq", "--qformat int4_wo", "--qformat nvfp4"),
        *("--awq_block_size 64", "--quantize_lm_head", "--batch_size 2"),
        *("--tokenizer_max_seq_length 64", "--pp_size 2", "--cp_size 2", "--autoq_format fp8"),
        "--auto_quantize_bits 8",
    ],
    "build_engine": [
        *("--model_config x", "--build_config x", "--max_input_len 99", "--max_beam_width 2"),
        *("--opt_num_tokens 5", "--kv_cache_type continuous", "--kv_cache_type disabled"),
        *("--input_timing_cache x", "--output_timing_cache x", "--profiling_verbosity detailed"),
        *("--workers 2", "--log_level debug", "--strip_plan", "--weight_sparsity"),
        *("--weight_streaming", "--fast_build", "--enable_debug_output", "--dry_run"),
        *("--monitor_memory", "--gather_context_logits", "--logits_dtype float16"),
        *("--lora_dir x", "--lora_ckpt_source nemo", "--lora_target_modules attn_q"),
        *("--max_lora_rank 8", "--speculative_decoding_mode medusa", "--max_draft_len 4"),
        *("--gpt_attention_plugin float16", "--gemm_plugin fp8", "--nccl_plugin float16"),
        *("--moe_plugin float16", "--fp8_rowwise_gemm_plugin float16", "--lora_plugin float16"),
        *("--low_latency_gemm_plugin fp8", "--gemm_swiglu_plugin fp8", "--context_fmha disable"),
        *("--remove_input_padding disable", "--use_paged_context_fmha disable"),
        *("--use_fp8_context_fmha enable", "--multiple_profiles enable", "--user_buffer enable"),
        *("--norm_quant_fusion enable", "--reduce_fusion enable"),
    ],
}


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, _SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("hf") / "tiny", dtype=torch.float32)


@pytest.mark.parametrize(
    ("script", "flag"), [(script, flag) for script, flags in _REFUSED.items() for flag in flags]
)
def test_what_is_not_implemented_is_refused_by_name(
    script: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = "--checkpoint_dir" if script == "build_engine" else "--model_dir"
    assert _script(script).main([needed, "/no/where/at/all", *flag.split()]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"llmserve: error: {flag} is not implemented")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "algo", "kv_algo", "dtype"),
    [
        # TensorRT-LLM turns float32 sources into float16 under auto.
        (_CONVERT, None, None, "float16"),
        ("--dtype float32", None, None, "float32"),
        ("--use_weight_only --weight_only_precision int8", "W8A16", None, "float16"),
        ("--use_weight_only --dtype bfloat16", "W8A16", None, "bfloat16"),
        ("--use_weight_only --int8_kv_cache --calib_size 4", "W8A16", "INT8", "float16"),
        ("--use_fp8_rowwise", "FP8_PER_CHANNEL_PER_TOKEN", None, "float16"),
        ("--use_fp8 --fp8_kv_cache --calib_size 4", "FP8", "FP8", "float16"),
        (
            *("--smoothquant 0.6 --per_channel --calib_size 4", "W8A8_SQ_PER_CHANNEL"),
            *(None, "float16"),
        ),
    ],
)
def test_convert_checkpoint(
    source: Path, tmp_path: Path, flags: str, algo: str | None, kv_algo: str | None, dtype: str
) -> None:
    paths = ["--model_dir", str(source), "--output_dir", str(tmp_path / "out")]
    assert _script("convert_checkpoint").main([*paths, *flags.split()]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config["quantization"]
    assert (quantization["quant_algo"], quantization["kv_cache_quant_algo"]) == (algo, kv_algo)
    assert config["dtype"] == dtype
    if algo == "W8A8_SQ_PER_CHANNEL":
        assert quantization["smoothquant_val"] == 0.6


@pytest.mark.parametrize("flags", [["--tp_size", "2"], ["--tp_size", "2", "--use_weight_only"]])
def test_ranks(source: Path, tmp_path: Path, flags: list[str]) -> None:
    paths = ["--model_dir", str(source), "--output_dir", str(tmp_path / "out")]
    assert _script("convert_checkpoint").main([*paths, *flags]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mapping"]["tp_size"], config["mapping"]["world_size"]) == (2, 2)
    assert sorted(path.name for path in (tmp_path / "out").glob("rank*")) == [
        "rank0.safetensors",
        "rank1.safetensors",
    ]


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("convert_checkpoint", "--use_weight_only --use_fp8_rowwise", "exclude each other"),
        ("convert_checkpoint", "--int8_kv_cache --fp8_kv_cache", "exclude each other"),
        ("convert_checkpoint", "--smoothquant 0.5", "--per_channel are implemented only together"),
        ("convert_checkpoint", "--per_channel", "--per_channel are implemented only together"),
        ("convert_checkpoint", "--calib_size 8", "--calib_size is given and nothing"),
        ("convert_checkpoint", "--calib_dataset x", "--calib_dataset is given and nothing"),
        ("convert_checkpoint", "--use_fp8 --calib_dataset x", "datasets are not fetched"),
        ("quantize", "--calib_max_seq_length 64", "--calib_max_seq_length is given and nothing"),
        ("quantize", "--seed 1", "--seed is given and nothing"),
        ("quantize", "--qformat fp8 --calib_dataset cnn/other", "datasets are not fetched"),
    ],
)
def test_flags_that_do_not_go_together(
    script: str, flags: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _script(script).main(["--model_dir", "x", *flags.split()]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "algo"),
    [
        (_QUANTIZE, None),
        ("--qformat int8_wo --device cpu", "W8A16"),
        ("--qformat fp8_pc_pt", "FP8_PER_CHANNEL_PER_TOKEN"),
        ("--qformat fp8 --kv_cache_dtype fp8 --calib_size 4", "FP8"),
        ("--qformat int8_sq --kv_cache_dtype int8 --calib_size 4", "W8A8_SQ_PER_CHANNEL"),
    ],
)
def test_quantize(source: Path, tmp_path: Path, flags: str, algo: str | None) -> None:
    paths = ["--model_dir", str(source), "--output_dir", str(tmp_path / "out")]
    assert _script("quantize").main([*paths, *flags.split()]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["quantization"]["quant_algo"], config["dtype"]) == (algo, "float16")


def test_build_engine(source: Path, tmp_path: Path) -> None:
    checkpoint = str(tmp_path / "checkpoint")
    _script("convert_checkpoint").main(["--model_dir", str(source), "--output_dir", checkpoint])
    paths = ["--checkpoint_dir", checkpoint, "--output_dir"]
    script = _script("build_engine")

    assert script.main([*paths, str(tmp_path / "defaults"), *_BUILD.split()]) == 0
    assert read_engine(tmp_path / "defaults")[1] == BuildConfig(max_seq_len=512)
    limits = ["--max_batch_size", "2", "--max_num_tokens", "32", "--max_seq_len", "16"]
    assert script.main([*paths, str(tmp_path / "engine"), *limits]) == 0
    assert read_engine(tmp_path / "engine")[1] == BuildConfig(
        max_batch_size=2, max_num_tokens=32, max_seq_len=16
    )


def test_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _script("quantize").main(["--model_dir", "x", "--qform", "fp8"])
    assert "unrecognized arguments: --qform fp8" in capsys.readouterr().err
