#!/usr/bin/env python3
"""Measures conversion: speed against cp, memory, and going on after a kill.

    python scripts/bench_convert.py --check

Makes a synthetic Llama checkpoint of random bfloat16 weights in several shards (or takes
--source), then in every round copies it with cp and fsync and converts it to every format, one
after the other, so that whatever else the machine does falls on all of them alike. The source is
read once before each, so that it is in the page cache for all. Conversion is timed from the call to
its return, with everything durable; the interpreter's start and torch's import are shown beside
it. Memory is RssAnon of the converting process, sampled while it runs.

Prints the hardware, a table, and one JSON line last. With --check the exit code is 1 if a goal is
missed: at least 0.8 of cp's speed, at most 1 GiB above the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import describe_machine

FORMATS = ("none", "w8a16", "fp8_rowwise")
MIN_RATIO = 0.8
MEMORY_ABOVE_LARGEST_BYTES = 2**30
SHARD_BYTES = 3 * 2**29
# Llama 3 8B's, but for the number of layers.
HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 4096, 14336, 32, 8, 128256

_CHILD = """
import json, resource, sys, time
start = time.perf_counter()
from llmserve.convert.converter import convert
begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
print("converting", flush=True)
convert(sys.argv[1], sys.argv[2], quant=sys.argv[3])
end, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
times = {"import_s": begin - start, "convert_s": end - begin}
times["user_s"] = after.ru_utime - before.ru_utime
times["system_s"] = after.ru_stime - before.ru_stime
print(json.dumps(times))
"""


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    work = Path(tempfile.mkdtemp(prefix="bench_convert.", dir=args.directory))
    try:
        source = args.source or args.keep or work / "source"
        if not (source / "config.json").is_file():
            print(f"making {args.size / 1e9:.1f} GB in {source}", file=sys.stderr)
            make_checkpoint(source, args.size)
        result = measure(source, work, args.rounds)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    missed = _show(result)
    for goal in missed:
        print(f"missed: {goal}", file=sys.stderr)
    print(json.dumps(result | {"missed": missed}))
    return 1 if args.check and missed else 0


def make_checkpoint(directory: Path, num_bytes: int) -> None:
    """Write a Llama checkpoint of about ``num_bytes`` of random bfloat16 weights, in shards."""
    import torch

    from llmserve.checkpoint.tensor_spec import TensorSpec
    from llmserve.checkpoint.writer import StreamingWriter

    kv = HIDDEN * KV_HEADS // HEADS
    layer = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    ends = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    per_layer = 2 * (2 * HIDDEN * (HIDDEN + kv) + 3 * HIDDEN * FFN)
    layers = max(1, round((num_bytes - 4 * VOCAB * HIDDEN) / per_layer))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": ends["lm_head.weight"]}
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in shapes.items()}
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, spec in specs.items():
        if sum(other.nbytes for other in shards[-1].values()) >= SHARD_BYTES:
            shards.append({})
        shards[-1][name] = spec
    directory.mkdir(parents=True, exist_ok=True)
    # One block of normal values, of which every tensor takes another stretch: made in a second.
    block = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        with StreamingWriter(directory / file, shard) as writer:
            for name, spec in shard.items():
                weight_map[name] = file
                left, begin = spec.nbytes // 2, 7919 * len(weight_map) % (2**23)
                while left:
                    part = block[begin : begin + min(left, 2**23)]
                    writer.append(name, part)
                    left, begin = left - len(part), (begin + 104729) % (2**23)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))


def measure(source: Path, work: Path, rounds: int) -> dict[str, Any]:
    """Copy and convert in turn, ``rounds`` times; then kill a conversion and go on."""
    files = sorted(source.glob("*.safetensors"))
    source_bytes = sum(file.stat().st_size for file in files)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ("cp", *FORMATS)}
    for number in range(rounds):
        _read_all(files)
        runs["cp"].append({"s": _copy(files, work / "copy")})
        for quant in FORMATS:
            _read_all(files)
            runs[quant].append(_convert(source, work / "out", quant))
            shutil.rmtree(work / "out")
        _progress(number + 1, rounds, runs, source_bytes)
    result: dict[str, Any] = {
        "benchmark": "convert",
        "machine": describe_machine(
            "torch",
            "blake3",
            "llmserve",
            threads=os.environ.get("OMP_NUM_THREADS", "default"),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        ),
        "source_bytes": source_bytes,
        "shards": len(files),
        "largest_tensor_bytes": _largest_tensor_bytes(files),
        "cp_bytes_per_s": [source_bytes / run["s"] for run in runs["cp"]],
    }
    for quant in FORMATS:
        result[quant] = {
            "bytes_per_s": [source_bytes / run["convert_s"] for run in runs[quant]],
            "ratio_to_cp": [
                copy["s"] / run["convert_s"]
                for copy, run in zip(runs["cp"], runs[quant], strict=True)
            ],
            "import_s": statistics.median(run["import_s"] for run in runs[quant]),
            "user_s": statistics.median(run["user_s"] for run in runs[quant]),
            "system_s": statistics.median(run["system_s"] for run in runs[quant]),
            "peak_rss_anon_bytes": max(run["peak_rss_anon_bytes"] for run in runs[quant]),
        }
    usual = statistics.median(run["convert_s"] for run in runs["fp8_rowwise"])
    result["kill_and_resume"] = _kill_and_resume(source, work, "fp8_rowwise", usual)
    return result


def _read_all(files: list[Path]) -> None:
    buffer = bytearray(2**22)
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def _copy(files: list[Path], target: Path) -> float:
    """Seconds that cp and fsync take."""
    target.mkdir()
    begin = time.perf_counter()
    subprocess.run(["cp", *map(str, files), str(target)], check=True)
    for path in (*sorted(target.iterdir()), target):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds


def _convert(
    source: Path,
    out: Path,
    quant: str,
    until: Callable[[float], bool] = lambda seconds: False,
) -> dict[str, float]:
    """Convert in a process of its own, killed when ``until(seconds of conversion)`` says so."""
    command = [sys.executable, "-c", _CHILD, str(source), str(out), quant]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        begin, peak = time.perf_counter(), 0
        while child.poll() is None:
            peak = max(peak, _rss_anon_bytes(child.pid))
            if until(time.perf_counter() - begin):
                child.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        output = child.stdout.read()
        child.wait()
    if child.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the conversion to {quant} failed with exit code {child.returncode}")
    times: dict[str, float] = json.loads(output) if output else {}
    return times | {"peak_rss_anon_bytes": peak}


def _rss_anon_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _kill_and_resume(source: Path, work: Path, quant: str, usual_s: float) -> dict[str, Any]:
    _convert(source, work / "whole", quant)
    _read_all(sorted(source.glob("*.safetensors")))
    _convert(source, work / "out", quant, until=lambda seconds: seconds > 0.6 * usual_s)
    killed = not (work / "out").exists()
    _read_all(sorted(source.glob("*.safetensors")))
    rest = _convert(source, work / "out", quant)
    same = subprocess.run(
        ["diff", "-r", str(work / "whole"), str(work / "out")], capture_output=True, check=False
    )
    for name in ("whole", "out"):
        shutil.rmtree(work / name)
    return {
        "quant": quant,
        "killed": killed,
        "killed_after_s": 0.6 * usual_s,
        "undisturbed_s": usual_s,
        "resumed_s": rest["convert_s"],
        "same_bytes": same.returncode == 0,
    }


def _largest_tensor_bytes(files: list[Path]) -> int:
    from llmserve.checkpoint.reader import RankReader

    largest = 0
    for file in files:
        with RankReader(file) as reader:
            largest = max([largest, *(reader.spec(name).nbytes for name in reader.names())])
    return largest


def _progress(
    done: int, rounds: int, runs: dict[str, list[dict[str, float]]], source_bytes: int
) -> None:
    speeds = (
        f"{name} {source_bytes / (run[-1].get('convert_s') or run[-1]['s']) / 1e9:.2f} GB/s"
        for name, run in runs.items()
    )
    print(f"round {done} of {rounds}: {', '.join(speeds)}", file=sys.stderr)


def _show(result: dict[str, Any]) -> list[str]:
    """Print what was measured; returns the goals that were missed."""
    machine, missed = result["machine"], []
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    largest = result["largest_tensor_bytes"]
    print(
        f"source: {result['source_bytes'] / 1e9:.2f} GB in {result['shards']} shards, "
        f"largest tensor {largest / 2**20:.0f} MiB; "
        f"cp + fsync {_spread(result['cp_bytes_per_s'], 1e9)} GB/s"
    )
    print("| quant | GB/s of the source | of cp's speed | CPU, s | peak RssAnon, MiB | start, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for quant in FORMATS:
        run = result[quant]
        print(
            f"| {quant} | {_spread(run['bytes_per_s'], 1e9)} | {_spread(run['ratio_to_cp'], 1)} | "
            f"{run['user_s']:.1f} + {run['system_s']:.1f} | "
            f"{run['peak_rss_anon_bytes'] / 2**20:.0f} | {run['import_s']:.1f} |"
        )
        if (ratio := statistics.median(run["ratio_to_cp"])) < MIN_RATIO:
            missed.append(f"{quant} runs at {ratio:.2f} of cp's speed; the goal is {MIN_RATIO}")
        if run["peak_rss_anon_bytes"] > largest + MEMORY_ABOVE_LARGEST_BYTES:
            missed.append(f"{quant} needs more than 1 GiB above the largest tensor")
    resume = result["kill_and_resume"]
    print(
        f"killed after {resume['killed_after_s']:.1f} s of {resume['undisturbed_s']:.1f} s "
        f"({resume['quant']}); the rest took {resume['resumed_s']:.1f} s; "
        f"{'the same bytes' if resume['same_bytes'] else 'OTHER BYTES'}"
    )
    if not resume["same_bytes"]:
        missed.append("a conversion that was killed and gone on with has other bytes")
    return missed


def _spread(values: list[float], unit: float) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle / unit:.2f} ({low / unit:.2f} to {high / unit:.2f})"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--source", type=Path, help="a Hugging Face checkpoint to measure with")
    place.add_argument("--keep", type=Path, help="make the synthetic one here and keep it")
    parser.add_argument(
        "--size", type=_size, default=_size("6.2GB"), help="of the synthetic one (6.2GB)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument(
        "--directory", type=Path, help="where to work; on the disk to measure (default: $TMPDIR)"
    )
    parser.add_argument("--check", action="store_true", help="exit code 1 if a goal is missed")
    return parser.parse_args()


def _size(text: str) -> int:
    if not text.upper().endswith("GB"):
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 6GB")
    return int(float(text[:-2]) * 1e9)


if __name__ == "__main__":
    sys.exit(main())
