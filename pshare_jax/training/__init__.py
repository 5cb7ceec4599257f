"""Training of decode modules on a frozen base; imports the model, never the server."""
