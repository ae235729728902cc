"""Fused ops, each with a Triton, a torch and a reference implementation; `dispatch` picks one."""
