"""The agent's networks: tokenizer, world model and controller."""
