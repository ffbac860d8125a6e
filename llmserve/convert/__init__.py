"""Hugging Face checkpoint -> TensorRT-LLM checkpoint, a tensor at a time."""
