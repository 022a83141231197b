"""DELTA's kernels for CUDA GPUs, in Triton. They know tensors, not vLLM.

A decode step at one layer is a series of launches whose grids depend on the number of rows alone, so that a
captured graph runs with any lengths:

- `schedule`: once a step, cuts every row into splits of about equal work, for whatever lengths there are;
- `attention`: one program per split and KV head; `combine`: one per row and head. A selection layer reads all
  tokens and leaves its `logits` behind; a sparse layer reads the kept pages, found through `paging`;
- `scores`: logits to page scores;
- `select`: page scores to the selection table.

A row may have several query tokens, which read its keys and values together: `queries`.

A launcher stands beside its kernel. `ops` puts them together into the three kinds of layers. `layer` is what
a launch reads, `shape` what it is compiled for, `workspace` its scratch memory; `device` and `tuning` are
what it asks of the GPU. Everything is tested against `vllm_delta.method.reference`.
"""
