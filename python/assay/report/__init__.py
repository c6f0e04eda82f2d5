"""Showing results: tables in four formats, progress on stderr. No arithmetic beyond formatting."""
