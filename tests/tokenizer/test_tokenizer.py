from __future__ import annotations

import json
import subprocess
import sys
from random import Random

import pytest
import transformers

from llmserve.errors import CheckpointError, CheckpointNotFoundError, InvalidRequestError
from llmserve.tokenizer import Tokenizer
from tests.tokenizer_files import BOS_ID, EOS_ID, IM_END_ID, write_metaspace_tokenizer
from tests.tokenizer_files import write_tokenizer as write


def test_ids_are_those_of_transformers(tmp_path):
    tokenizer = Tokenizer.from_directory(write(tmp_path, add_bos=True))
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ["", "the quick brown fox", " Grüße, 日本 😀\n\n<|im_end|>x", "a\x00b"]:
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert ids == reference.encode(text, add_special_tokens=special)
            for skip in (True, False):
                decoded = tokenizer.decode(ids, skip_special_tokens=skip)
                assert decoded == reference.decode(ids, skip_special_tokens=skip)


def test_special_tokens_and_vocabulary(tmp_path):
    tokenizer = Tokenizer.from_directory(write(tmp_path))
    assert tokenizer.vocab_size == 320
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS_ID, IM_END_ID)
    assert tokenizer.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
    assert tokenizer.special_token_ids == {0, 1, 2, 3}


def test_a_named_special_token_is_one_although_tokenizer_json_does_not_say_so(tmp_path):
    write_metaspace_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "</s>"]
    path.write_text(json.dumps(data))
    tokenizer = Tokenizer.from_directory(tmp_path)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = tokenizer.encode("the</s>he")
    assert ids == reference.encode("the</s>he")
    assert 2 in ids
    assert 2 in tokenizer.special_token_ids
    assert tokenizer.decode([2]) == reference.decode([2], skip_special_tokens=True) == ""


def test_special_tokens_of_older_checkpoints(tmp_path):
    write(tmp_path, bos_token=None)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|endoftext|>"}})
    )
    assert Tokenizer.from_directory(tmp_path).eos_token_id == EOS_ID


def test_a_length_limit_in_the_file_is_not_applied(tmp_path):
    path = write(tmp_path) / "tokenizer.json"
    data = json.loads(path.read_text())
    data["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(data))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.decode(tokenizer.encode("one two three four")) == "one two three four"


def test_bytes_of_tokens(tmp_path):
    byte_level = Tokenizer.from_directory(write(tmp_path / "b"))
    ids = byte_level.encode(" é<|im_end|>")
    raw = [byte_level.token_to_bytes(i) for i in ids]
    assert raw == [b" ", b"\xc3", b"\xa9", b"<|im_end|>"]
    metaspace = Tokenizer.from_directory(write_metaspace_tokenizer(tmp_path / "m"))
    raw = [metaspace.token_to_bytes(i) for i in metaspace.encode("the 日")]
    assert raw == [b" the", b" ", b"\xe6", b"\x97", b"\xa5"]
    for no_token in (-1, 320, 10**6):
        assert byte_level.token_to_bytes(no_token) == b""


def test_half_a_surrogate_pair_is_refused(tmp_path):
    tokenizer = Tokenizer.from_directory(write(tmp_path))
    with pytest.raises(InvalidRequestError, match="surrogate") as info:
        tokenizer.encode("a\ud800b")
    assert info.value.param == "prompt"
    with pytest.raises(InvalidRequestError) as info:
        tokenizer.apply_chat_template([{"role": "user", "content": "\udfff"}])
    assert info.value.param == "messages"


@pytest.mark.parametrize("enough", [0, 10, 700])
def test_a_long_text_is_counted_by_its_beginning(tmp_path, enough):
    tokenizer = Tokenizer.from_directory(write(tmp_path))
    words = ["the quick ", "Grüße, 日本 😀\n", "x" * 5_000, " " * 3_000, "<|im_end|>"]
    random = Random(enough)
    for _ in range(20):
        text = "".join(random.choices(words, k=random.randint(0, 40)))
        at_least = tokenizer.num_tokens_at_least(text, enough)
        num_tokens = len(tokenizer.encode(text))
        assert at_least <= num_tokens
        # Whatever goes on being uncertain is cheap to encode.
        assert at_least > enough or len(text) <= 16 * (num_tokens + 512 + enough)
    encoded = []
    tokenizer.encode = lambda text, **_: encoded.append(len(text)) or [5] * (len(text) // 5)
    assert tokenizer.num_tokens_at_least("word " * 1_000_000, enough) > enough
    assert sum(encoded) < 40 * (enough + 256)


def test_what_is_wrong_on_disk_is_named(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    write(tmp_path, eos_token=7)
    with pytest.raises(CheckpointError, match="eos_token is 7"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json holds no JSON object"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_directory(tmp_path)


def test_the_serving_path_imports_neither_transformers_nor_torch():
    code = (
        "import sys, llmserve.tokenizer; print([m for m in ('torch', 'transformers', 'numpy') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
