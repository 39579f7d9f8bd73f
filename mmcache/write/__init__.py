"""Writing a store: create, append, FullActivationCache."""
