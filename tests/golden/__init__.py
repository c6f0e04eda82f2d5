"""Golden vectors: what other projects' libraries made and what they read from it."""
