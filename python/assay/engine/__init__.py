"""Runs a model end to end with the ops: paged key-value cache, a small transformer, decoding with speculation."""
