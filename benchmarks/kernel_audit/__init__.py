"""Judge the Triton kernels without a GPU: `python -m benchmarks.kernel_audit`.

- What is a case: `calls` (operations, floors), `cases` (at which sizes, and what `make test` runs).
- What is measured: `compiled` with `machine_code` (registers, stack, matrix products, async copies),
  `offsets` (integers that leave 32 bits), `traffic` (bytes, flops and faulty accesses, in Triton's
  interpreter).
- What is the target: `targets`; `table` keeps the rows in a CSV and prints them.
"""
