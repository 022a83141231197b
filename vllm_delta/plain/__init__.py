"""What has to be right and not fast, in plain PyTorch: live recall, and methods to compare DELTA with.

`cache` reads sequences out of the paged cache, `rows` are query tokens of one request at one layer.
"""
