"""Judge the Triton kernels without a GPU: `python -m benchmarks.kernel_audit`.

- What is audited: `calls` (operations and their floors), `cases` (at which sizes, and what `make test` runs).
- What is measured: `compiled` (registers, stack, matrix products, async copies), `triton_ir` (integers that
  leave 32 bits, suspect products), `traffic` (bytes, flops and faulty accesses, in Triton's interpreter).
- How many programs a launch has: `programs`.
- What is promised: `targets`, which also keeps the rows in a CSV.
"""
