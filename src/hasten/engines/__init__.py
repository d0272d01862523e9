"""What can stand in for a transformer's blocks at run time."""
