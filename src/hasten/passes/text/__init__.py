"""Text encoders: answers to past prompts kept (`embeddings`), weights in eight bits (`weights`)."""
