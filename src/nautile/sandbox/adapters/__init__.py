"""Sandboxes for other projects' interfaces. Nothing here is imported unless it is asked for: those projects are optional."""
