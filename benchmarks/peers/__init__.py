"""The same work by other implementations, and alternatives to it; each if it can be imported."""
