"""Instruments that judge the Triton kernels without a GPU; `benchmarks.kernel_audit` runs them all.

- `traffic`: bytes and flops counted, and faulty accesses found, in Triton's interpreter.
- `launches`, `compiled`, `machine_code`, `offsets`: what the launchers would compile, compiled ahead of
time, and read.
- `calls`, `cases`, `targets`: what is audited, and what it must meet.
- `table`: the CSV, which keeps the rows of earlier audits.
"""
