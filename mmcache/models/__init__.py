"""Models: sites, hooks, loading."""
