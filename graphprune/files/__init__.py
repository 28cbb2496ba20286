"""Bytes on disk: whole or not at all, tensors bit by bit, one name for each file of a run."""
