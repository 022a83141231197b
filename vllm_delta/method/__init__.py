"""What DELTA is: settings, the plan of layers, the rows of a step, counters, and the specification.

Plain Python and tensors. Nothing here knows vLLM or a platform.
"""
