"""Speculative decoding around the verification kernels: draft trees, proposers, and proof that a rule is lossless."""
