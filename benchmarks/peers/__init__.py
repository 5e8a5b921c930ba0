"""The same work by others, and what people use instead; each where it can be imported."""
