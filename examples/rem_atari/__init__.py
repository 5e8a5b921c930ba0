"""REM: a token-based world-model agent for Atari, assembled on :mod:`retpop`.

The agent of "Improving Token-Based World Models with Parallel Observation Prediction" (arXiv 2402.05643):
a VQ-VAE tokenizer, a retention world model that predicts whole observations in parallel (POP), and an
actor-critic trained in imagination. Start with ``rem-atari --help``.
"""
