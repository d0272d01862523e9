"""The `[text]` pass: a cache of prompt embeddings, and text encoder weights in eight bits."""
