"""From a model and text to a store: plan, fill, resume."""
