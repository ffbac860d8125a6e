"""From text to token ids and back: the same for every engine.

It knows the files of a tokenizer and nothing of requests, engines or HTTP.
"""

from llmserve.tokenizer.chat_template import ChatTemplate
from llmserve.tokenizer.detokenizer import IncrementalDetokenizer
from llmserve.tokenizer.generation_config import GenerationConfig
from llmserve.tokenizer.stop_strings import StopStringMatcher
from llmserve.tokenizer.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "GenerationConfig",
    "IncrementalDetokenizer",
    "StopStringMatcher",
    "Tokenizer",
]
