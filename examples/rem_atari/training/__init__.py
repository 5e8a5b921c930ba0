"""Training the agent: one module per phase, and the trainer that goes through them epoch by epoch."""
