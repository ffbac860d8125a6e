"""What is on disk and nothing else: config.json, tensor names and shapes, readers and writers."""
