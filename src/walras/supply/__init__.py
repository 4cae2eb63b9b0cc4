"""What an engine's resources cost: its state, prices of its tokens and memory, and what follows from them. [Z §3.3]"""
