"""Text, tokens and model for `perplexity.py`."""
