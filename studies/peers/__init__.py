"""Whole images of hasten and of what else can be installed, timed side by side on one device."""
