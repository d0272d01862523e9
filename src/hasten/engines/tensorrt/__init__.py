"""From a transformer to a TensorRT engine: calibrate → export → verify → build → run."""

PROMPTS = 4  # to calibrate FP8 on, by default
