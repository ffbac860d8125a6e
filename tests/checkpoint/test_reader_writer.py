import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmserve.checkpoint.reader import RankReader
from llmserve.checkpoint.scratch import Scratch
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.checkpoint.writer import StreamingWriter
from llmserve.errors import CheckpointError, CheckpointNotFoundError, UnsupportedCheckpointError


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(5, 3, generator=generator)
    return {
        # Odd sizes of narrow dtypes first: written in this order the others would be misaligned.
        "int8": torch.randint(-128, 127, (3, 5), generator=generator).to(torch.int8),
        "fp8": plain.to(torch.float8_e4m3fn),
        "bfloat16": plain.bfloat16(),
        "float16": plain.half(),
        "float32": plain,
        "transposed": plain.t(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }


def _specs(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("backwards", [False, True])
def test_the_library_reads_what_is_written_in_any_order(tmp_path: Path, backwards: bool) -> None:
    tensors, path = _tensors(), tmp_path / "x.safetensors"
    with StreamingWriter(path, _specs(tensors)) as writer:
        for name in sorted(tensors, reverse=backwards):
            writer.write(name, tensors[name])

    read = load_file(path)

    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].shape == tensor.shape
        assert _same_bytes(read[name], tensor), name


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    tensors, path = _tensors(), tmp_path / "x.safetensors"
    with StreamingWriter(path, _specs(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_the_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    specs = {"a": TensorSpec((2, 2), torch.float32), "b": TensorSpec((1,), torch.int8)}
    with StreamingWriter(tmp_path / "x", specs) as writer:
        with pytest.raises(CheckpointError, match="c has no place"):
            writer.write("c", torch.zeros(1))
        with pytest.raises(CheckpointError, match=r"float32 \[4\].*float32 \[2, 2\]"):
            writer.write("a", torch.zeros(4))
        with pytest.raises(CheckpointError, match=r"float16 \[2, 2\]"):
            writer.write("a", torch.zeros(2, 2, dtype=torch.float16))
        writer.write("a", torch.zeros(2, 2))
        with pytest.raises(CheckpointError, match="before"):
            writer.write("a", torch.zeros(2, 2))
        writer.write("b", torch.zeros(1, dtype=torch.int8))


def test_a_tensor_that_was_never_written_is_named(tmp_path: Path) -> None:
    specs = {f"t{i}": TensorSpec((1,), torch.int8) for i in range(5)}
    with pytest.raises(CheckpointError, match="lacks t1, t2, t3 and 1 more"):  # noqa: SIM117
        with StreamingWriter(tmp_path / "x", specs) as writer:
            writer.write("t0", torch.zeros(1, dtype=torch.int8))


def test_reader_gives_names_specs_and_mapped_values(tmp_path: Path) -> None:
    tensors, path = _tensors(), tmp_path / "x.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with RankReader(path) as reader:
        assert reader.names() == sorted(tensors)
        assert {name: reader.spec(name) for name in tensors} == _specs(tensors)
        read = {name: reader.tensor(name) for name in tensors}
    # Valid after closing, too.
    assert all(_same_bytes(read[name], tensors[name]) for name in tensors)


def test_reader_errors_name_file_and_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"nothing\.safetensors"):
        RankReader(tmp_path / "nothing.safetensors")
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(100), "u": torch.zeros(2, dtype=torch.uint16)}, path)
    with RankReader(path) as reader:
        with pytest.raises(CheckpointError, match=r"x\.safetensors has no tensor b"):
            reader.tensor("b")
        with pytest.raises(UnsupportedCheckpointError, match=r"u in .* U16"):
            reader.spec("u")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"cut short.*download it again"):
        RankReader(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        RankReader(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cut short"):
        RankReader(path)


def test_rows_go_behind_one_another_whatever_their_place_in_memory(tmp_path: Path) -> None:
    # Large enough to go past the page cache, and beginning in the middle of a page.
    values = torch.randn(300_007, generator=torch.Generator().manual_seed(0))
    specs = {"a": TensorSpec((3,), torch.int8), "b": TensorSpec((300_007,), torch.float32)}
    for aligned in (False, True):
        path, scratch = tmp_path / f"{aligned}.safetensors", Scratch()
        with StreamingWriter(path, specs) as writer:
            for part in values.split(100_001):
                if aligned:
                    offset = writer.position("b")
                    place = scratch.tensor("b", (len(part),), part.dtype, file_offset=offset)
                    assert (place.data_ptr() - offset) % 4096 == 0
                    part = place.copy_(part)
                writer.append("b", part)
            writer.append("a", torch.tensor([1, 2, 3], dtype=torch.int8))
        read = load_file(path)
        assert torch.equal(read["b"], values)
        assert read["a"].tolist() == [1, 2, 3]


def test_a_file_system_that_refuses_unbuffered_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    values = torch.randn(300_007)
    specs = {"b": TensorSpec((300_007,), torch.float32)}

    def refuse(descriptor: int, view: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, view[: 2**17], offset)  # and writes less than asked for

    monkeypatch.setattr(os, "pwrite", refuse)
    with StreamingWriter(tmp_path / "x", specs) as writer:
        writer.write("b", values)
    assert torch.equal(load_file(tmp_path / "x")["b"], values)


def test_more_values_than_announced_are_refused(tmp_path: Path) -> None:
    specs = {"a": TensorSpec((2, 2), torch.float32)}
    with StreamingWriter(tmp_path / "x", specs) as writer:
        writer.append("a", torch.zeros(3))
        with pytest.raises(CheckpointError, match="does not fit behind 12 bytes of a"):
            writer.append("a", torch.zeros(2))
        with pytest.raises(CheckpointError, match="does not fit"):
            writer.append("a", torch.zeros(1, dtype=torch.float16))
        writer.append("a", torch.zeros(1))
    with (
        pytest.raises(CheckpointError, match="lacks a"),
        StreamingWriter(tmp_path / "y", specs) as w,
    ):
        w.append("a", torch.zeros(3))


def test_a_file_is_gone_on_with(tmp_path: Path) -> None:
    tensors, path = _tensors(), tmp_path / "x.safetensors"
    specs = _specs(tensors)
    names = sorted(tensors)
    with pytest.raises(KeyError), StreamingWriter(path, specs) as writer:  # noqa: PT012
        for name in names[:4]:
            writer.write(name, tensors[name])
        raise KeyError
    with pytest.raises(FileExistsError):
        StreamingWriter(path, specs)
    with pytest.raises(CheckpointError, match="not the file that was begun"):
        StreamingWriter(path, {**specs, "int8": TensorSpec((15,), torch.int8)}, resume=True)
    with StreamingWriter(path, specs, resume=True) as writer:
        for name in names[:4]:
            assert b"".join(writer.read(name, 7)) == bytes(
                tensors[name].contiguous().reshape(-1).view(torch.uint8).tolist()
            )
            writer.keep(name)
            with pytest.raises(CheckpointError, match="before"):
                writer.write(name, tensors[name])
        for name in names[4:]:
            writer.write(name, tensors[name])
    read = load_file(path)
    assert all(_same_bytes(read[name], tensors[name]) for name in tensors)


def test_bytes_are_read_into_memory_that_is_there(tmp_path: Path) -> None:
    tensors, path = _tensors(), tmp_path / "x.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with RankReader(path) as reader:
        with pytest.raises(ValueError, match="not open for reading"):
            reader.read_into("fp8", 0, torch.empty(1))
        reader.open_for_reading()
        for name, tensor in tensors.items():
            out = torch.empty(tensor.shape, dtype=tensor.dtype)
            reader.read_into(name, 0, out)
            assert _same_bytes(out, tensor), name
        out = torch.empty(2, 3)
        reader.read_into("float32", 3 * 3 * 4, out)
        assert torch.equal(out, tensors["float32"][3:])
        content = path.read_bytes()
        assert content.startswith(reader.header)
        assert sorted(reader.names_in_order()) == reader.names()
        os.truncate(path, len(content) - 70)
        with pytest.raises(CheckpointError, match="cut short while it was read"):  # noqa: PT012
            for name, tensor in tensors.items():
                reader.read_into(name, 0, torch.empty(tensor.shape, dtype=tensor.dtype))


def test_dropped_pages_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    large = torch.arange(2**22, dtype=torch.int32).view(1024, -1)  # 16 MiB
    save_file({"large": large, "small": torch.ones(3)}, path)
    with RankReader(path) as reader:
        held = reader.tensor("large")
        assert torch.equal(held, large)
        before = _resident_file_bytes()
        reader.drop_pages("large")
        assert _resident_file_bytes() < before - 2**23
        reader.drop_pages("small")
        assert torch.equal(held, large)
        assert torch.equal(reader.tensor("small"), torch.ones(3))


def _resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("RssFile")).split()[1])
