"""Training the agent: one module per phase, and the trainer that runs them epoch by epoch."""
