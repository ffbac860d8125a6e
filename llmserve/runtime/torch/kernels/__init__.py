"""The operations of a decoder on flat tensors, each beside a slow and obvious reference.

They know tensors alone: neither requests, nor the scheduler, nor a model's layers.
"""
