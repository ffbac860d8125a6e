"""Engines: something that turns requests into streams of tokens. Each runs one model."""
