"""Benchmarks and audits of retpop, run from the root of a checkout: `python -m benchmarks.kernel_audit`."""
