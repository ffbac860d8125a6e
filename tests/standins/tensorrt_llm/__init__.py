"""A stand-in for NVIDIA's package: the signatures and the behaviour that its API is described with.

It refuses everything else. Its version is that of the metadata beside it, as the real one's is: up
to 1.2 it runs engines, from 1.3 on it runs Hugging Face checkpoints. Answers come from
``llmserve.runtime.fake.expected_tokens``, so that they can be checked: greedily of the prompt,
otherwise of the prompt with the seed behind it. ``_behaviour`` makes it slow, hang, fail or die.
"""

from importlib.metadata import version

from tensorrt_llm._llm import LLM
from tensorrt_llm._params import SamplingParams

__version__ = version("tensorrt-llm")
__all__ = ["LLM", "SamplingParams"]
