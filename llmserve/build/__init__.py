"""TensorRT-LLM checkpoint -> engine for the hardware at hand."""
