"""The GPU report: what `benchmarks/gpu_report.sh` runs.

`report` starts each part in a process of its own and prints the table; `worker` is such a process; `floors`,
`ops`, `peers`, `decoders` and `agent` are what the parts measure; `rows` and `clock` are what they share.
"""
