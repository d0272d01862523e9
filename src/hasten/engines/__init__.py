"""Exported engines that replace a transformer's blocks at run time."""
