"""One file a group of routes, each with its `router`."""
