"""Times whole images of hasten and of other installable libraries in turns on one device."""
