"""Time of decoding, of whole generations and of servers, inside vLLM."""
