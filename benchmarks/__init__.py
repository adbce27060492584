"""How much time choices of the code save, each compared with its control."""
