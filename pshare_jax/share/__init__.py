"""The idea of the project: one frozen prefill module computes the KV, and the decode modules of many tasks read it.

Models and decode modules on disk and on a mesh, LoRA in PEFT's format, the boundary rule, a view as NNX modules, and the plain
generation loop that every faster path is compared with. The engine, training and evaluation build on this room; it stands on
model, weights, text and sampling. Nothing here locks: an object belongs to the thread that made it, except for frozen weights.
"""
