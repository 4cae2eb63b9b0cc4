"""A serving engine as a production function: its state, how long its steps take, and its replay. [Z §3.3]"""
