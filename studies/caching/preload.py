"""What every job imports, imported once, in the process that jobs are forked from.

A peer is imported in its own jobs alone. A module that is missing here is no fault: a job that
needs it says so.
"""

from contextlib import suppress
from importlib import import_module

for name in (
    "studies.caching.row",
    "diffusers.pipelines.flux.pipeline_flux",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
):
    with suppress(Exception):
        import_module(name)
