"""DELTA's kernels for CUDA GPUs, in Triton. They know tensors, not vLLM.

A decode step at one layer is a chain of launches whose grids depend on the number of rows alone, so that a
captured graph serves any lengths:

- `schedule`: once a step, cuts every row into pieces of about equal work, for whatever lengths there are;
- `attention`: one program per piece and KV head, then one program per row and head to combine the pieces. A
  selection layer reads all tokens and leaves its logits behind; a sparse layer reads the kept pages;
- `scores`: logits to page scores;
- `select`: page scores to the selection table.

`ops` launches them. Everything is tested against `vllm_delta.reference`.
"""
