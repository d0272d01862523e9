"""Imports the modules that all jobs need, once, in the process that jobs are forked from.

Peers are imported only in their own jobs. A module that is missing here is not an error; a job
that needs it reports it.
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
