"""Records which of torch.compile's settings a row has changed, as part of its recipe."""

from __future__ import annotations

from typing import Any

__all__ = ["changed", "compiler_settings"]


def compiler_settings() -> dict[str, Any]:
    """Inductor's and Dynamo's settings now, by name."""
    import torch._dynamo.config
    import torch._inductor.config

    modules = {"inductor": torch._inductor.config, "dynamo": torch._dynamo.config}
    return {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.get_config_copy().items()
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """New values of the settings that differ, as text."""
    return {key: repr(after[key]) for key in sorted(after) if after[key] != before.get(key)}
