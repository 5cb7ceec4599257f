"""Tasks that are loaded and unloaded at run time."""
