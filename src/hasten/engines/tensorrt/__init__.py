"""From a transformer to a TensorRT engine: calibrate → export → verify → build → run."""

PROMPTS = 4  # default number of prompts for the FP8 calibration
