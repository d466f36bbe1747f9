"""From a config to an adapter: prepare, train, and continue what was interrupted."""
