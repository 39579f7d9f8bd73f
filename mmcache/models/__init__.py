"""Loading models, resolving sites to modules, and capturing activations with hooks."""
