"""Conversion some rows at a time against conversion of whole tensors, and against being stopped."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import quantized_linear
from llmserve.checkpoint.huggingface import HuggingFaceCheckpoint
from llmserve.config import CalibrationConfig, ConvertConfig
from llmserve.convert import converter, stream
from llmserve.convert.calibrate import ActivationRanges
from llmserve.convert.calibrate import calibrate as _calibrate
from llmserve.convert.converter import convert
from llmserve.convert.families import family
from llmserve.convert.journal import JOURNAL_FILE
from llmserve.convert.plain_tensors import PlainTensors
from llmserve.convert.plan import Target, make_plan
from llmserve.convert.record import ConversionRecord
from llmserve.convert.target_config import target_config
from llmserve.errors import CheckpointError
from llmserve.quantization import weight_format
from llmserve.quantization.layout import checkpoint_tensors, rank_shards
from tests.models import make_llama, make_model

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Experts, halves in another order, norms with an offset, and biases; sizes that are no powers of 2.
_MODELS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 76, "vocab_size": 331, "attention_bias": True},
    "qwen3_moe": {"vocab_size": 323},
    "phi3": {"intermediate_size": 88},
    "gemma": {"intermediate_size": 72},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoints by family and dtype, made once."""

    @cache
    def make(name: str, dtype: str) -> Path:
        path = tmp_path_factory.mktemp(f"{name}-{dtype}")
        return make_model(
            path,
            name,
            dtype=_DTYPES[dtype],
            max_shard_size="60KB",
            tokenizer=False,
            **_MODELS[name],
        )

    return make


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _whole(
    source: Path, config: PretrainedConfig, plan: list[Target]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The tensors of the result and the quantisation errors, each from a whole tensor."""
    algo = config.quantization.quant_algo
    tensors, errors = {}, {}
    with HuggingFaceCheckpoint(source) as checkpoint:
        plain = PlainTensors(checkpoint, plan)
        for target in plan:
            tensor, linear = plain.tensor(target.name), quantized_linear(config, target.name)
            stored = {target.name: tensor}
            if linear is not None:
                quantized = weight_format(algo).quantize(tensor)
                difference = weight_format(algo).dequantize(quantized).double() - tensor.double()
                errors[target.name] = float(difference.norm() / tensor.double().norm())
                if algo != "W8A16":
                    stored = {f"{linear}.{suffix}": t for suffix, t in quantized.items()}
            tensors |= {name: t.clone() for name, t in stored.items()}
    return tensors, errors


def _execute(
    source: Path, out: Path, chunk_bytes: int, **wanted: Any
) -> tuple[PretrainedConfig, list[Target], ConversionRecord]:
    out.mkdir()
    with HuggingFaceCheckpoint(source) as checkpoint:
        config = target_config(checkpoint, ConvertConfig(**wanted))
        plan = make_plan(checkpoint, family(checkpoint.config), config)
        record = stream.execute(plan, checkpoint, config, out, identity={}, chunk_bytes=chunk_bytes)
    return config, plan, record


def _check_files(
    source: Path, out: Path, config: PretrainedConfig, plan: list[Target], record: ConversionRecord
) -> None:
    """Compare every rank's file and the record with whole tensors and their bytes."""
    whole, errors = _whole(source, config, plan)
    for rank in range(config.tp_size):
        file = out / f"rank{rank}.safetensors"
        written = load_file(file)
        shards = rank_shards(config, checkpoint_tensors(config), rank)
        assert written.keys() == shards.keys()
        for tensor, shard in shards.items():
            expected = shard.take(whole[tensor])
            assert written[tensor].dtype == expected.dtype
            assert written[tensor].shape == expected.shape
            assert _bytes(written[tensor]) == _bytes(expected), tensor
        digests = record.result[file.name].tensors
        assert digests == {t: blake3(_bytes(value)).hexdigest() for t, value in written.items()}
    for file in sorted(source.glob("*.safetensors")):
        tensors = load_file(file)
        digests = record.source[file.name].tensors
        assert digests == {t: blake3(_bytes(value)).hexdigest() for t, value in tensors.items()}
    assert record.quantization_error == pytest.approx(errors, rel=1e-4)
    assert (config.quantization.quant_algo is None) == (not errors)


@settings(
    max_examples=16,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    name=st.sampled_from(list(_MODELS)),
    dtypes=st.tuples(st.sampled_from(list(_DTYPES)), st.sampled_from(list(_DTYPES))),
    quant=st.sampled_from(["none", "w8a16", "fp8_rowwise"]),
    tp_size=st.sampled_from([1, 2]),
    chunk_bytes=st.sampled_from([1, 300, 5000, stream.CHUNK_BYTES]),
)
def test_rows_at_a_time_give_what_whole_tensors_do(
    models: Any,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    dtypes: tuple[str, str],
    quant: str,
    tp_size: int,
    chunk_bytes: int,
) -> None:
    source, out = models(name, dtypes[0]), tmp_path_factory.mktemp("run") / "out"
    config, plan, record = _execute(
        source, out, chunk_bytes, quant=quant, dtype=dtypes[1], tp_size=tp_size
    )
    _check_files(source, out, config, plan, record)


def test_large_rows_that_begin_anywhere_in_a_page(tmp_path: Path) -> None:
    # Large enough for writing past the page cache, with tensors that begin at odd places.
    source = make_llama(
        tmp_path / "hf",
        dtype=torch.bfloat16,
        tokenizer=False,
        vocab_size=3001,
        hidden_size=132,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=66,
        intermediate_size=1002,
        num_hidden_layers=1,
    )
    for quant, tp_size in (("none", 1), ("fp8_rowwise", 1), ("w8a16", 2)):
        out = tmp_path / f"{quant}{tp_size}"
        done = _execute(source, out, 200_000, quant=quant, tp_size=tp_size)
        _check_files(source, out, *done)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data(), value=st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_one_bad_value_anywhere_is_found_and_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: float
) -> None:
    directory = tmp_path_factory.mktemp("bad")
    dtype = data.draw(st.sampled_from(list(_DTYPES.values())))
    source = make_llama(directory / "hf", dtype=dtype, tokenizer=False, num_hidden_layers=1)
    state = load_file(source / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(state)))
    state[name].view(-1)[data.draw(st.integers(0, state[name].numel() - 1))] = value
    save_file(state, source / "model.safetensors")
    quant = data.draw(st.sampled_from(["none", "w8a16", "fp8_rowwise"]))
    with pytest.raises(CheckpointError, match=f"^{name} in .* holds NaN or infinity$"):
        convert(source, directory / "out", quant=quant)
    assert [path.name for path in directory.iterdir()] == ["hf"]


def test_what_a_narrower_dtype_cannot_hold_is_named(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", tokenizer=False)
    state = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    state[name][-1, -1] = 1e5
    save_file(state, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} .* beyond float16's largest.*bfloat16"):
        convert(source, tmp_path / "out", dtype="float16")
    convert(source, tmp_path / "out", dtype="bfloat16")


def test_rows_in_another_order_have_the_digest_of_the_file(models: Any, tmp_path: Path) -> None:
    # Phi-3's [gate; up] becomes [up; gate]: the digest is still that of the tensor as it stands.
    source = models("phi3", "bfloat16")
    _, _, record = _execute(source, tmp_path / "out", 1000, quant="none")
    digests = {name: d for file in record.source.values() for name, d in file.tensors.items()}
    name = "model.layers.0.mlp.gate_up_proj.weight"
    files = [load_file(file) for file in source.glob("*.safetensors")]
    (tensor,) = [file[name] for file in files if name in file]
    assert digests[name] == blake3(_bytes(tensor)).hexdigest()


def test_digests_are_those_of_the_files_bytes(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", tokenizer=False)
    out = convert(source, tmp_path / "out", quant="fp8_rowwise")
    record = json.loads((out / "quality.json").read_text())
    assert record["digest_algorithm"] == "blake3"
    for side, file in (
        ("source", source / "model.safetensors"),
        ("result", out / "rank0.safetensors"),
    ):
        said, content = record[side][file.name], file.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:begin])
        header.pop("__metadata__", None)
        whole = blake3(content[:begin])
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = tensor["data_offsets"]
            digest = blake3(content[begin + first : begin + last])
            assert said["tensors"].pop(name) == digest.hexdigest()
            whole.update(digest.digest())
        assert not said["tensors"]
        assert said["digest"] == whole.hexdigest()


_CONVERT = textwrap.dedent("""
    import os, signal, sys, threading, time
    from pathlib import Path
    from llmserve.config import CalibrationConfig
    from llmserve.checkpoint.writer import StreamingWriter
    from llmserve.convert import stream
    from llmserve.convert.converter import convert

    source, out, quant, text, stop_at, by = sys.argv[1:]
    stream.BATCH_BYTES = 20_000
    append, calls, turn = StreamingWriter.append, 0, threading.Lock()

    def counted(self, name, values):
        global calls
        with turn:
            calls += 1
            if calls == int(stop_at):
                time.sleep(0.2)  # the thread that writes down what is finished may be behind
                os.kill(os.getpid(), signal.Signals[by])
        append(self, name, values)

    StreamingWriter.append = counted
    calibration = CalibrationConfig(path=Path(text)) if text else None
    convert(source, out, quant=quant, calibration=calibration)
""")


def _command(
    source: Path, out: Path, quant: str, stop_at: int, by: str, text: Path | str = ""
) -> list[str]:
    command = [sys.executable, "-c", _CONVERT, str(source), str(out), quant, str(text)]
    return [*command, str(stop_at), by]


def _stopped(
    source: Path, out: Path, quant: str, stop_at: int, by: str = "SIGKILL", text: Path | str = ""
) -> None:
    """Convert in a process that is stopped at its so-manieth write; it leaves one directory."""
    done = subprocess.run(
        _command(source, out, quant, stop_at, by, text), capture_output=True, check=False
    )
    assert done.returncode in (-signal.Signals[by], 1), done.stderr.decode()
    assert not out.exists()
    assert len(_left(out.parent)) == 1


def _content(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def _left(directory: Path) -> list[Path]:
    return sorted(directory.glob(".out.tmp-*"))


def _source(directory: Path) -> Path:
    return make_llama(
        directory / "hf", dtype=torch.bfloat16, max_shard_size="90KB", num_hidden_layers=6
    )


def _goes_on(source: Path, caplog: pytest.LogCaptureFixture, quant: str = "none") -> bool:
    """Convert, check that the result is that of an undisturbed run, tell whether it went on."""
    caplog.clear()
    out, again = source.with_name("out"), source.with_name("again")
    convert(source, out, quant=quant)
    went_on = "going on with" in caplog.text
    convert(source, again, quant=quant)
    assert _content(out) == _content(again)
    assert sorted(path.name for path in source.parent.iterdir()) == ["again", "hf", "out"]
    return went_on


def test_a_killed_conversion_goes_on_to_the_same_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = _source(tmp_path)
    # Killed twice, the second time on what the first had left: 72 writes are more than either.
    for stop_at in (35, 25):
        _stopped(source, tmp_path / "out", "fp8_rowwise", stop_at)
    assert _goes_on(source, caplog, "fp8_rowwise")


@pytest.mark.parametrize("same_text", [True, False])
def test_a_killed_conversion_is_calibrated_once(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    same_text: bool,
) -> None:
    source, text = _source(tmp_path), tmp_path / "text.jsonl"
    text.write_text(json.dumps({"token_ids": list(range(30))}))
    _stopped(source, tmp_path / "out", "int8_sq", 60, text=text)
    calibrated = []

    def calibrate(*args: Any, **settings: Any) -> ActivationRanges:
        calibrated.append(args)
        return _calibrate(*args, **settings)

    monkeypatch.setattr(converter, "calibrate", calibrate)
    if not same_text:
        text.write_text(json.dumps({"token_ids": list(range(30, 60))}))
    settings = CalibrationConfig(path=text)
    out = convert(source, tmp_path / "out", quant="int8_sq", calibration=settings)
    assert ("going on with" in caplog.text) == same_text
    assert bool(calibrated) != same_text
    again = convert(source, tmp_path / "again", quant="int8_sq", calibration=settings)
    assert _content(out) == _content(again)
    assert _left(tmp_path) == []


@pytest.mark.full
@pytest.mark.parametrize("quant", ["none", "w8a16", "fp8_rowwise"])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, quant: str
) -> None:
    source = _source(tmp_path)
    for stop_at in range(1, 45, 4):
        _stopped(source, tmp_path / "out", quant, stop_at)
        _goes_on(source, caplog, quant)
        for made in ("out", "again"):
            shutil.rmtree(tmp_path / made)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = _source(tmp_path_factory.mktemp("killed"))
    _stopped(source, source.with_name("out"), "none", 35)
    return source.parent


@pytest.fixture
def stopped(killed: Path, tmp_path: Path) -> Path:
    """A source beside which a conversion to 'out' was killed on its way."""
    shutil.copytree(killed, tmp_path / "stopped")  # times included, which count
    (left,) = _left(tmp_path / "stopped")
    assert (left / JOURNAL_FILE).read_text().count("\n") > 2
    return tmp_path / "stopped" / "hf"


def test_the_same_conversion_goes_on(stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert _goes_on(stopped, caplog)


def test_other_settings_begin_anew(stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not _goes_on(stopped, caplog, quant="w8a16")


def test_a_changed_source_begins_anew(stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = sorted(stopped.glob("*.safetensors"))[0]
    os.utime(shard, ns=(0, time.time_ns()))
    assert not _goes_on(stopped, caplog)


@pytest.mark.parametrize("line", [0, 1])
def test_a_damaged_journal_begins_anew(
    stopped: Path, caplog: pytest.LogCaptureFixture, line: int
) -> None:
    journal = _left(stopped.parent)[0] / JOURNAL_FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"', b"'", 1)
    journal.write_bytes(b"".join(lines))
    assert not _goes_on(stopped, caplog)


def test_a_last_line_that_was_cut_does_not_count(
    stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = _left(stopped.parent)[0] / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-20])
    assert _goes_on(stopped, caplog)


def test_lost_bytes_of_the_last_batch_begin_anew(
    stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = _left(stopped.parent)[0]
    last = json.loads((left / JOURNAL_FILE).read_bytes().splitlines()[-1][9:])
    file = left / "rank0.safetensors"
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    begin, end = header[last["target"]]["data_offsets"]
    content[8 + length + begin : 8 + length + end] = bytes(end - begin)
    file.write_bytes(content)
    assert not _goes_on(stopped, caplog)
    assert "damaged, starting over" in caplog.text


def test_a_lost_file_begins_anew(stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    (_left(stopped.parent)[0] / "rank0.safetensors").unlink()
    assert not _goes_on(stopped, caplog)


@pytest.mark.parametrize("by", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.full)])
def test_a_signal_stops_it_as_a_kill_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, by: str
) -> None:
    source = _source(tmp_path)
    _stopped(source, tmp_path / "out", "none", 35, by)
    assert _goes_on(source, caplog)


def test_a_directory_that_another_process_fills_is_not_shared(tmp_path: Path) -> None:
    source = _source(tmp_path)
    command = _command(source, tmp_path / "out", "none", 35, "SIGSTOP")
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        os.waitid(os.P_PID, running.pid, os.WSTOPPED)
        (filled,) = _left(tmp_path)
        content = _content(filled)
        convert(source, tmp_path / "out")
        assert _left(tmp_path) == [filled]
        assert _content(filled) == content
    finally:
        running.send_signal(signal.SIGCONT)
        running.wait()
    # It finds its place taken, and cleans up after itself.
    assert running.returncode != 0
    assert _left(tmp_path) == []


def test_the_callers_number_of_threads_stays(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", tokenizer=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        convert(source, tmp_path / "out", quant="fp8_rowwise")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
