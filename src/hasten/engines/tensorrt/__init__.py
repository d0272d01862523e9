"""From a transformer to a TensorRT engine: calibrate → export → verify → build → run."""
