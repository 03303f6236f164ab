"""Checkpoints: what a model folder says, and how its tensors get to the layers."""
