"""What decides a result: the code that a function reaches, as hashes."""
