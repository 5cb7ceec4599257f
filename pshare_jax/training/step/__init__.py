"""Step: the device programs of training, as pure functions over pytrees.

`objective` is the loss, `cross_entropy` its head, `optimizer` the update rule, `steps` compiles them for the mesh of
`mesh.py`. The trainer, the dry run and the training benchmark call them; nothing here reads files or keeps state.
"""
