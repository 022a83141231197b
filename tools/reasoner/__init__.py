"""A small model that reasons in long chains: its problems, its tokenizer, its training from scratch."""
