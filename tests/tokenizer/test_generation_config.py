from __future__ import annotations

import json

import pytest

from llmserve.errors import CheckpointError
from llmserve.tokenizer import GenerationConfig, Tokenizer
from tests.tokenizer_files import EOS_ID, IM_END_ID, IM_START_ID, write_tokenizer


def read(directory, **generation_config):
    write_tokenizer(directory, generation_config=generation_config)
    return GenerationConfig.from_directory(directory, Tokenizer.from_directory(directory))


@pytest.mark.parametrize(
    ("in_file", "expected"),
    [
        ([EOS_ID, IM_START_ID], (EOS_ID, IM_START_ID, IM_END_ID)),
        (EOS_ID, (EOS_ID, IM_END_ID)),
        (None, (IM_END_ID,)),
    ],
)
def test_an_answer_ends_at_every_end_of_sequence_token(tmp_path, in_file, expected):
    """The tokenizer's own is <|im_end|>."""
    assert read(tmp_path, eos_token_id=in_file).eos_token_ids == expected


def test_config_json_stands_in_for_the_list(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": EOS_ID}))
    assert read(tmp_path).eos_token_ids == (EOS_ID, IM_END_ID)
    assert read(tmp_path, eos_token_id=IM_START_ID).eos_token_ids == (IM_START_ID, IM_END_ID)


def test_without_a_file_there_are_no_defaults(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = GenerationConfig.from_directory(tmp_path, Tokenizer.from_directory(tmp_path))
    assert config == GenerationConfig(eos_token_ids=(IM_END_ID,))
    assert config.sampling_defaults() == {}


def test_sampling_defaults(tmp_path):
    config = read(tmp_path, do_sample=True, temperature=0.6, top_p=0.9, top_k=20, min_p=0.1)
    assert (config.temperature, config.top_p, config.top_k, config.min_p) == (0.6, 0.9, 20, 0.1)
    assert config.sampling_defaults() == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.1,
    }


def test_do_sample_false_means_greedy_whatever_stands_beside_it(tmp_path):
    config = read(tmp_path, do_sample=False, temperature=0.6, top_p=0.9, repetition_penalty=1.1)
    assert config.sampling_defaults() == {"temperature": 0.0, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": "high"}, "generation_config.json"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": [1, None]}, "eos_token_id is"),
    ],
)
def test_a_bad_value_is_named(tmp_path, values, says):
    with pytest.raises(CheckpointError, match=says):
        read(tmp_path, **values)
