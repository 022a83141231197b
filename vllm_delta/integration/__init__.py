"""The part that knows vLLM. Whoever follows vLLM's next version should touch this folder alone.

`plugin` registers, `platform` and `worker` hook into vLLM's CPU platform, `validation` refuses what DELTA
does not serve, `cpu` is the attention backend, `state` is what the layers of a worker share, `compat` names
the supported versions and what to check when vLLM moves.
"""
